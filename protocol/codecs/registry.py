"""The codecs by the names that they have on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from protocol.codec_names import LOSSLESS_SUFFIX, parse_codec
from protocol.codecs.codec import Codec, FixedSizeCodec
from protocol.codecs.cosine import Cosine
from protocol.codecs.int4 import Int4, Int4Asymmetric
from protocol.codecs.int8 import Int8
from protocol.codecs.pq import ProductQuantiser
from protocol.codecs.raw import BFloat16, Float16, Float32, Int64, RawCodec, UInt8
from protocol.codecs.svd import Svd
from protocol.codecs.topk import TopK
from protocol.codecs.zstd import Compressed

CODECS: dict[str, RawCodec] = {
    codec.name: codec for codec in (Float32(), Float16(), BFloat16(), Int64(), UInt8())
}

"""Those that send a tensor's own bytes."""

_WITHOUT_PARAMETER: dict[str, Codec] = {
    codec.name: codec for codec in (Int8(), Int4(), Int4Asymmetric(), ProductQuantiser())
}

_WITH_PARAMETER: dict[str, Callable[[str, str], Codec]] = {
    "topk": lambda parameter, name: TopK(Fraction(parameter), name),
    "cosine": lambda parameter, name: Cosine(int(parameter), name),
    "svd": lambda parameter, name: Svd(float(parameter), name),
}


@lru_cache(maxsize=64)
def get_codec(name: str) -> Codec:
    """The codec of this name (see `protocol.codec_names`).

    Raises:
        UnknownCodec: there is none, its parameter is not allowed, or a library that it needs is
            not installed here.
    """
    parts = parse_codec(name)
    if parts.compressed:
        return Compressed(get_codec(name.removesuffix(LOSSLESS_SUFFIX)), name)
    if parts.parameter is not None:
        return _WITH_PARAMETER[parts.base](parts.parameter, name)
    return CODECS.get(parts.base) or _WITHOUT_PARAMETER[parts.base]


def encoded_bytes(name: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor of this shape under a codec: its buffers, without header and padding.

    None where they depend on what the tensor holds.

    Raises:
        UnknownCodec: there is no such codec, or its parameter is not allowed.
    """
    if parse_codec(name).compressed:
        return None  # known also where the library is not
    codec = get_codec(name)
    return sum(codec.sizes(shape)) if isinstance(codec, FixedSizeCodec) else None


def as_decoded(tensor: Tensor, codec: str) -> Tensor:
    """What the other end makes of a tensor that is sent with this codec, in float32.

    It may share the tensor's memory.

    Raises:
        InvalidField: the codec does not carry these numbers.
    """
    one = get_codec(codec.removesuffix(LOSSLESS_SUFFIX))
    return one.decode(one.encode(tensor), tensor.shape).to(torch.float32)
