"""The codecs by the names that they have on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from protocol.codec_names import parse_codec
from protocol.codecs.codec import Codec, FixedSizeCodec
from protocol.codecs.int4 import Int4, Int4Asymmetric
from protocol.codecs.int8 import Int8
from protocol.codecs.raw import BFloat16, Float16, Float32, Int64, RawCodec, UInt8

CODECS: dict[str, RawCodec] = {
    codec.name: codec for codec in (Float32(), Float16(), BFloat16(), Int64(), UInt8())
}
"""Those that send a tensor's own bytes."""

_LOSSY: dict[str, Callable[[], Codec]] = {
    codec.name: codec for codec in (Int8, Int4, Int4Asymmetric)
}


@lru_cache(maxsize=64)
def codec_named(name: str) -> Codec:
    """The codec of this name (see `protocol.codec_names`).

    Raises:
        UnknownCodec: there is none, its parameter is not allowed, or a library that it needs is
            not installed here.
    """
    parts = parse_codec(name)
    return CODECS[parts.base] if parts.base in CODECS else _LOSSY[parts.base]()


def encoded_bytes(name: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor of this shape under a codec: its buffers, without header and padding.

    None where they depend on what the tensor holds.

    Raises:
        UnknownCodec: see `codec_named`.
    """
    codec = codec_named(name)
    return sum(codec.sizes(shape)) if isinstance(codec, FixedSizeCodec) else None
