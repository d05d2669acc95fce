"""Codecs, which encode tensors as buffers: one class for each base name."""

from protocol.codecs.codec import Buffer, Codec, FixedSizeCodec
from protocol.codecs.cosine import Cosine
from protocol.codecs.feedback import ErrorFeedback
from protocol.codecs.int4 import Int4, Int4Asymmetric
from protocol.codecs.int8 import Int8
from protocol.codecs.klt import Klt
from protocol.codecs.pq import ProductQuantiser
from protocol.codecs.raw import BFloat16, Float16, Float32, Int64, RawCodec, UInt8
from protocol.codecs.registry import CODECS, encoded_bytes, get_codec
from protocol.codecs.svd import Svd
from protocol.codecs.topk import TopK
from protocol.codecs.zstd import Compressed

__all__ = [
    "CODECS",
    "BFloat16",
    "Buffer",
    "Codec",
    "Compressed",
    "Cosine",
    "ErrorFeedback",
    "FixedSizeCodec",
    "Float16",
    "Float32",
    "Int4",
    "Int4Asymmetric",
    "Int8",
    "Int64",
    "Klt",
    "ProductQuantiser",
    "RawCodec",
    "Svd",
    "TopK",
    "UInt8",
    "encoded_bytes",
    "get_codec",
]
