"""The codecs by their names on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

from protocol.arrays import SomeArray, backend_of
from protocol.codec_names import LOSSLESS_SUFFIX, parse_codec
from protocol.codecs.codec import Codec, FixedSizeCodec
from protocol.codecs.cosine import Cosine
from protocol.codecs.int4 import Int4, Int4Asymmetric
from protocol.codecs.int8 import Int8
from protocol.codecs.klt import Klt
from protocol.codecs.pq import ProductQuantiser
from protocol.codecs.raw import BFloat16, Float16, Float32, Int64, RawCodec, UInt8
from protocol.codecs.svd import Svd
from protocol.codecs.topk import TopK
from protocol.codecs.zstd import Compressed

CODECS: dict[str, RawCodec] = {
    codec.name: codec for codec in (Float32(), Float16(), BFloat16(), Int64(), UInt8())
}

_WITHOUT_PARAMETER: dict[str, Codec] = {
    codec.name: codec for codec in (Int8(), Int4(), Int4Asymmetric(), ProductQuantiser())
}

_WITH_PARAMETER: dict[str, Callable[[str, str], Codec]] = {
    "topk": lambda parameter, name: TopK(Fraction(parameter), name),
    "cosine": lambda parameter, name: Cosine(int(parameter), name),
    "svd": lambda parameter, name: Svd(float(parameter), name),
    "klt": lambda parameter, name: Klt(float(parameter), name),
}


@lru_cache(maxsize=64)
def get_codec(name: str) -> Codec:
    """Return the codec of this name (see `protocol.codec_names`).

    Raises:
        UnknownCodec: the name or its parameter is not allowed, or a library that the codec needs
            is not installed.
    """
    parts = parse_codec(name)
    if parts.compressed:
        return Compressed(get_codec(name.removesuffix(LOSSLESS_SUFFIX)), name)
    if parts.parameter is not None:
        return _WITH_PARAMETER[parts.base](parts.parameter, name)
    return CODECS.get(parts.base) or _WITHOUT_PARAMETER[parts.base]


def encoded_bytes(name: str, shape: Sequence[int]) -> int | None:
    """Return the bytes of a tensor's buffers with this codec, without header and padding.

    None if the number depends on the tensor's values.

    Raises:
        UnknownCodec: the name or its parameter is not allowed.
    """
    if parse_codec(name).compressed:
        return None  # does not need the zstandard library
    codec = get_codec(name)
    return sum(codec.sizes(shape)) if isinstance(codec, FixedSizeCodec) else None


def as_decoded(array: SomeArray, codec: str) -> SomeArray:
    """Encode and decode an array, which gives the float32 values that the other end decodes.

    The result is of the same library and on the same device. It may share the array's memory.

    Raises:
        InvalidField: the codec cannot encode these numbers.
    """
    lossy = get_codec(codec.removesuffix(LOSSLESS_SUFFIX))
    xp = backend_of(array).xp
    decoded = lossy.decode_like(array, lossy.encode(array))
    plain: SomeArray = xp.astype(decoded, xp.float32, copy=False)
    return plain
