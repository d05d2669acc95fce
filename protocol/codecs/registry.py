"""The codecs by the names that they have on the wire."""

from __future__ import annotations

from protocol.codecs.codec import Codec
from protocol.codecs.raw import BFloat16, Float16, Float32, Int64, UInt8
from protocol.errors import UnknownCodec

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Float32(), Float16(), BFloat16(), Int64(), UInt8())
}


def codec_named(name: str) -> Codec:
    """The codec of this name.

    Raises:
        UnknownCodec: there is none.
    """
    codec = CODECS.get(name)
    if codec is None:
        raise UnknownCodec(
            "this end does not have that codec", field="codec", limit=sorted(CODECS), value=name
        )
    return codec
