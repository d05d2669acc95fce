"""Invalid frames: name, bytes, the expected error code, and the reason."""

import math
import struct

from tests.protocol_vectors import rans
from tests.protocol_vectors.by_hand import (
    THIRDS,
    UNIT_BUFFER,
    UNIT_SPEC,
    brains,
    floats,
    frame,
    halves,
    header,
    klt,
    single_tensor,
    spec,
    zstd,
)

TWICE = b"\x83\xa4kind\xa1a\xa4meta\x82\xa1k\x01\xa1k\x02\xa7tensors\x90"  # {"k": 1, "k": 2}


def meta(packed):
    """Build a header with the meta {"x": packed}."""
    return b"\x83\xa4kind\xa1a\xa4meta\x81\xa1x" + packed + b"\xa7tensors\x90"


def nested(depth):
    return b"\x91" * depth + b"\xc0"


def small_klt(steps=(1.0, 1.0), reach=1, extra=b"", state=0):
    """Build a tensor of rank 1; ``state`` is added to the first state of the codes."""
    tables = [rans.table(1, 100, 100), rans.table(1, 100, 100), rans.table(1, 128, 90)]
    head, (step_bytes, _, words) = klt(
        [4, 16], steps, tables, [[1, 1]] * 16, [[0], [1], [0], [-1]], extra
    )
    place = len(rans.encode([[1, 1]] * 16, tables[:2]))
    words = words[:place] + bytes([words[place] ^ state]) + words[place + 1 :]
    tables[2] = rans.table(reach, 128, 90)
    return head, [step_bytes, b"".join(tables), words]


good = frame(header([UNIT_SPEC]), [UNIT_BUFFER])

INVALID = [
    ("nothing", b"", "malformed_frame", "an empty frame"),
    ("short-prefix", good[:27], "malformed_frame", "shorter than the prefix"),
    ("truncated", good[:-64], "damaged_frame", "the last buffer is missing"),
    ("longer", good + bytes(64), "damaged_frame", "more bytes than the checksum is of"),
    *(
        (
            f"flipped-{name}",
            frame(header([UNIT_SPEC]), [UNIT_BUFFER], flip=at),
            "damaged_frame",
            why,
        )
        for name, at, why in [
            ("magic", 0, "a changed bit of the magic"),
            ("version", 4, "a changed bit of the version"),
            ("total", 12, "a changed bit of the total length"),
            ("checksum", 20, "a changed bit of the checksum"),
            ("header", 40, "a changed bit of the header"),
            ("buffer", -64, "a changed bit of a buffer"),
            ("padding", -1, "a changed bit of the padding"),
        ]
    ),
    ("magic", frame(header(), magic=b"SFPG"), "malformed_frame", "wrong magic"),
    ("version", frame(header(), version=3), "unsupported_version", "version 3"),
    ("reserved", frame(header(), reserved=1), "malformed_frame", "reserved is not zero"),
    ("header-length", frame(header(), length=262_145), "too_large", "header over its limit"),
    ("header-past-end", frame(header(), length=4096), "malformed_frame", "header past the end"),
    (
        "total",
        frame(header(), total=2**63),
        "malformed_frame",
        "the total length is not the real length",
    ),
    ("header-padding", frame(header(), pad=b"\x01"), "malformed_frame", "padding is not zero"),
    (
        "buffer-padding",
        frame(header([UNIT_SPEC]), [UNIT_BUFFER], pad=b"\x01"),
        "malformed_frame",
        "padding is not zero",
    ),
    ("unowned", frame(header(), [bytes(64)]), "malformed_frame", "bytes that belong to no tensor"),
    ("not-msgpack", frame(b"\xc1"), "malformed_frame", "a byte that msgpack never uses"),
    ("not-a-map", frame(b"\x90"), "malformed_frame", "the header is a list"),
    ("two-values", frame(b"\x80\x80"), "malformed_frame", "two values in the header"),
    (
        "missing-key",
        frame({"kind": "a", "meta": {}}),
        "malformed_frame",
        "no tensors in the header",
    ),
    (
        "extra-key",
        frame({**header(), "pickle": 1}),
        "malformed_frame",
        "an unknown key in the header",
    ),
    ("kind-type", frame(header(kind=1)), "malformed_frame", "kind is a number"),
    ("binary", frame(meta(b"\xc4\x00")), "malformed_frame", "msgpack binary, even empty"),
    ("extension", frame(meta(b"\xc7\x00\x05")), "malformed_frame", "msgpack extension type 5"),
    (
        "timestamp",
        frame(meta(b"\xd6\xff\x00\x00\x00\x00")),
        "malformed_frame",
        "msgpack time-stamp",
    ),
    (
        "nan",
        frame(meta(b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00")),
        "malformed_frame",
        "NaN in meta",
    ),
    ("infinity", frame(meta(b"\xca\x7f\x80\x00\x00")), "malformed_frame", "infinity in meta"),
    ("not-utf8", frame(meta(b"\xa1\xff")), "malformed_frame", "text that is not UTF-8"),
    ("integer-key", frame(meta(b"\x81\x01\x02")), "malformed_frame", "a key that is not text"),
    ("key-twice", frame(TWICE), "malformed_frame", "a repeated key in one map"),
    ("deep", frame(meta(nested(8))), "too_large", "nine levels of nesting"),
    ("very-deep", frame(meta(nested(5000))), "too_large", "5000 levels of nesting"),
    (
        "long-list",
        frame(meta(b"\xdd\xff\xff\xff\xff")),
        "too_large",
        "a list that declares 4294967295 items",
    ),
    ("long-text", frame(header(kind="k" * 257)), "too_large", "a kind of 257 bytes"),
    (
        "many-tensors",
        frame(header([spec(str(n), "float32", [0], 0) for n in range(513)])),
        "too_large",
        "513 tensors",
    ),
    (
        "spec-keys",
        frame(header([{**UNIT_SPEC, "strides": [1]}]), [UNIT_BUFFER]),
        "malformed_frame",
        "an unknown key in a tensor's description",
    ),
    (
        "unnamed",
        frame(header([spec("", "float32", [1], 4)]), [UNIT_BUFFER]),
        "malformed_frame",
        "a tensor without a name",
    ),
    (
        "codec",
        frame(header([spec("smashed", "pickle", [1], 4)]), [UNIT_BUFFER]),
        "unknown_codec",
        "no such codec",
    ),
    (
        "size",
        frame(header([spec("smashed", "float32", [2], 4)]), [UNIT_BUFFER]),
        "malformed_frame",
        "4 bytes for two float32",
    ),
    (
        "size-huge",
        frame(header([spec("smashed", "float32", [2**20], 2**22)]), [UNIT_BUFFER]),
        "malformed_frame",
        "a buffer past the end of the frame",
    ),
    (
        "two-buffers",
        frame(header([spec("smashed", "float32", [2], 4, 4)]), [UNIT_BUFFER, UNIT_BUFFER]),
        "malformed_frame",
        "two buffers for a raw codec",
    ),
    (
        "negative",
        frame(header([spec("smashed", "float32", [-1], 4)]), [UNIT_BUFFER]),
        "malformed_frame",
        "a negative dimension",
    ),
    (
        "boolean-dimension",
        frame(header([spec("smashed", "float32", [True], 4)]), [UNIT_BUFFER]),
        "malformed_frame",
        "a dimension that is a boolean",
    ),
    (
        "dimensions",
        frame(header([spec("smashed", "float32", [1] * 6, 4)]), [UNIT_BUFFER]),
        "too_large",
        "six dimensions",
    ),
    (
        "elements",
        frame(header([spec("smashed", "float32", [2**14, 2**15], 2**31)])),
        "too_large",
        "2^29 elements",
    ),
    (
        "hidden-by-zero",
        frame(header([spec("smashed", "float32", [0, 2**62, 4], 0)])),
        "too_large",
        "dimensions that overflow, with a zero among them",
    ),
    (
        "same-name",
        frame(header([UNIT_SPEC, UNIT_SPEC]), [UNIT_BUFFER, UNIT_BUFFER]),
        "malformed_frame",
        "two tensors with the same name",
    ),
]


NAN, INFINITY = math.nan, math.inf

INVALID_CODECS = [
    *(
        (
            f"name-{name.replace(':', '-').replace('+', '-')}",
            single_tensor(name, [1], bytes(4)),
            why,
        )
        for name, why in [
            ("topk:0", "a share of 0"),
            ("topk:1.5", "a share above 1"),
            ("svd:0.0000001", "seven decimals"),
            ("svd:1e-1", "an exponent"),
            ("cosine:9", "nine bits"),
            ("klt:0", "a step of 0"),
            ("klt:10", "a step of 10"),
            ("klt:.5", "no digit before the point"),
            ("int8:8", "a parameter for a codec without one"),
            ("pq+zstd+zstd", "the suffix twice"),
        ]
    ),
    ("int8-scale", single_tensor("int8", [1, 2], b"\x01\x02", floats(NAN)), "a scale of NaN"),
    ("int8-negative", single_tensor("int8", [1, 2], b"\x01\x02", floats(-1)), "a negative scale"),
    (
        "int8-huge",
        single_tensor("int8", [1, 2], b"\x01\x02", floats(2.0**120)),
        "a scale above 2^119",
    ),
    ("int8-rows", single_tensor("int8", [2, 2], bytes(4), bytes(4)), "one scale for two rows"),
    ("int4-scale", single_tensor("int4", [2], b"\x88", brains(INFINITY)), "an infinite scale"),
    (
        "int4-unused",
        single_tensor("int4", [1], b"\x88", brains(1)),
        "an unused half that is not zero",
    ),
    ("int4-groups", single_tensor("int4", [65], bytes(33), bytes(2)), "one scale for two groups"),
    (
        "int4-asym-minimum",
        single_tensor("int4-asym", [2], b"\x00", brains(1), brains(-INFINITY)),
        "an infinite minimum",
    ),
    ("pq-code", single_tensor("pq", [2, 4], b"\x00\x02", bytes(32)), "a code beyond the codebook"),
    ("pq-codebook", single_tensor("pq", [4], b"\x00", floats(1, NAN, 0, 0)), "NaN in the codebook"),
    (
        "topk-falling",
        single_tensor("topk:0.5", [4], struct.pack("<2I", 2, 1), brains(1, 1)),
        "decreasing indices",
    ),
    (
        "topk-twice",
        single_tensor("topk:0.5", [4], struct.pack("<2I", 1, 1), brains(1, 1)),
        "a repeated index",
    ),
    (
        "topk-past-end",
        single_tensor("topk:0.5", [4], struct.pack("<2I", 1, 4), brains(1, 1)),
        "an index beyond the tensor",
    ),
    (
        "topk-value",
        single_tensor("topk:0.5", [2], bytes(4), brains(INFINITY)),
        "an infinite value",
    ),
    (
        "cosine-code",
        single_tensor("cosine:3", [2], bytes([3, 7]), struct.pack("<2d", *THIRDS)),
        "the unused code",
    ),
    (
        "cosine-unused",
        single_tensor("cosine:4", [1], bytes([0x17]), struct.pack("<2d", *THIRDS)),
        "an unused bit that is not zero",
    ),
    (
        "cosine-bound",
        single_tensor("cosine:8", [1], bytes(1), struct.pack("<2d", 1, 1.6)),
        "a bound above a right angle",
    ),
    (
        "cosine-norm",
        single_tensor("cosine:8", [1], bytes(1), struct.pack("<2d", INFINITY, 0)),
        "an infinite norm",
    ),
    (
        "svd-rank",
        single_tensor("svd:0.9", [4, 5], bytes(8), bytes(4), bytes(20)),
        "factors of different ranks",
    ),
    (
        "svd-large",
        single_tensor("svd:0.9", [4, 5], bytes(32), bytes(16), bytes(40)),
        "factors no smaller than the tensor",
    ),
    (
        "svd-vector",
        single_tensor("svd:0.9", [2, 3], halves(1, -1.5), floats(1), halves(0, 0, 1)),
        "an element above 1 in a singular vector",
    ),
    (
        "svd-value",
        single_tensor("svd:0.9", [2, 3], halves(1, 0), floats(-1), halves(0, 0, 1)),
        "a negative singular value",
    ),
    (
        "klt-rank",
        single_tensor("klt:1", [2, 8], bytes(8), bytes(28), bytes(12)),
        "rank 3 of two tokens",
    ),
    (
        "klt-large",
        single_tensor("klt:1", [2, 8], bytes(2), bytes(4), bytes(58)),
        "64 bytes for 16 values",
    ),
    (
        "klt-tables",
        single_tensor("klt:1", [2, 8], bytes(4), bytes(8), bytes(12)),
        "a table is missing",
    ),
    ("klt-half-word", single_tensor("klt:1", [2, 8], bytes(2), bytes(4), bytes(13)), "half a word"),
    ("klt-step", small_klt(steps=[-1.0, 1.0]), "a negative step"),
    ("klt-nan", small_klt(steps=[1.0, NAN]), "a step of NaN"),
    ("klt-huge", small_klt(steps=[1.0, 2.0**126]), "values above 2^126"),
    ("klt-reach", small_klt(reach=16_384), "a reach above 16,383"),
    ("klt-behind", small_klt(extra=b"\0\0"), "a word behind the codes"),
    (
        "klt-short",
        single_tensor("klt:1", [2, 8], bytes(2), bytes(4), bytes(4)),
        "no state of a lane",
    ),
    (
        "klt-state",
        single_tensor("klt:1", [2, 8], bytes(2), bytes(4), bytes(12)),
        "states below 2^32",
    ),
    ("klt-end", small_klt(state=1), "a lane that does not end at 2^32"),
    ("zstd-flag", single_tensor("float32+zstd", [1], floats(1) + b"\x02"), "a last byte of 2"),
    ("zstd-empty", single_tensor("float32+zstd", [0], b""), "a buffer without its last byte"),
    ("zstd-long", single_tensor("float32+zstd", [1], bytes(6)), "a buffer two bytes too long"),
    (
        "zstd-no-frame",
        single_tensor("uint8+zstd", [40], bytes(20) + b"\x01"),
        "not a Zstandard frame",
    ),
    (
        "zstd-size",
        single_tensor("uint8+zstd", [40], zstd(b"\x07" * 40, size=41) + b"\x01"),
        "a content size other than the codec's",
    ),
    (
        "zstd-short",
        single_tensor("uint8+zstd", [40], zstd(b"\x07" * 39, size=40) + b"\x01"),
        "less content than declared",
    ),
    (
        "zstd-behind",
        single_tensor("uint8+zstd", [40], zstd(b"\x07" * 40) + b"\x00\x01"),
        "a byte after the frame",
    ),
    (
        "zstd-no-gain",
        single_tensor("uint8+zstd", [10], zstd(b"\x07" * 10) + b"\x01"),
        "a frame as long as its content",
    ),
]
