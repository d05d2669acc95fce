"""How a tensor becomes bytes: one registry of codecs, by the names they have on the wire."""

from protocol.codecs.codec import Buffer, Codec, Device
from protocol.codecs.raw import BFloat16, Float16, Float32, Int64, RawCodec, UInt8
from protocol.codecs.registry import CODECS, codec_named

__all__ = [
    "CODECS",
    "BFloat16",
    "Buffer",
    "Codec",
    "Device",
    "Float16",
    "Float32",
    "Int64",
    "RawCodec",
    "UInt8",
    "codec_named",
]
