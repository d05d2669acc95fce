"""Write protocol/vectors anew: python tests/make_protocol_vectors.py

The bytes are laid out here by hand after SPEC.md, without the package, so that the vectors are a
second opinion on it and not its echo.
"""

import json
import math
import struct
from pathlib import Path

import msgpack

FOLDER = Path(__file__).parents[1] / "protocol" / "vectors"


def padded(data):
    return data + bytes(-len(data) % 64)


def frame(
    header, buffers=(), *, magic=b"SFPF", version=1, reserved=0, length=None, total=None, pad=None
):
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    length = len(packed) if length is None else length
    body = packed + bytes(-(20 + len(packed)) % 64) + b"".join(padded(b) for b in buffers)
    total = 20 + len(body) if total is None else total
    data = struct.pack("<4sHHIQ", magic, version, reserved, length, total) + body
    return data if pad is None else data[:-1] + pad


def header(tensors=(), kind="forward", meta=None):
    meta = {"step": "1.0.0", "round": 1} if meta is None else meta
    return {"kind": kind, "meta": meta, "tensors": list(tensors)}


def spec(name, codec, shape, *sizes):
    return {"name": name, "codec": codec, "shape": list(shape), "sizes": list(sizes)}


def brain(value):
    """bfloat16 of a value that it can hold exactly."""
    return struct.pack("<f", value)[2:]


F32 = [0.0, 1.0, -2.5, 0.15625, 3.4028234663852886e38, 1.401298464324817e-45]
F16 = [0.0, -1.0, 65504.0, 5.960464477539063e-08]
BF16 = [1.0, -0.5, 3.3895313892515355e38]
I64 = [0, -1, 9007199254740991, -9007199254740991]
LONG = [float(number) for number in range(17)]  # 68 bytes: over one block of 64

f32 = struct.pack("<6f", *F32)
ONE = spec("smashed", "float32", [1], 4)
ONE_BUFFER = struct.pack("<f", 1.0)

VALID = [
    ("forward-float32", header([spec("smashed", "float32", [1, 2, 3], 24)]), [f32], [F32]),
    (
        "forward-float16",
        header([spec("smashed", "float16", [2, 1, 2], 8)]),
        [struct.pack("<4e", *F16)],
        [F16],
    ),
    (
        "backward-bfloat16",
        header([spec("gradients", "bfloat16", [3, 1, 1], 6)], "backward"),
        [b"".join(map(brain, BF16))],
        [BF16],
    ),
    ("uint8", header([spec("ids", "uint8", [2, 2], 4)]), [b"\x00\x01\x80\xff"], [[0, 1, 128, 255]]),
    ("int64", header([spec("ids", "int64", [4], 32)], "ids"), [struct.pack("<4q", *I64)], [I64]),
    ("scalar", header([spec("smashed", "float32", [], 4)]), [ONE_BUFFER], [[1.0]]),
    ("empty-tensor", header([spec("smashed", "float16", [0, 5], 0)]), [b""], [[]]),
    ("no-tensors", header(kind="nothing", meta={}), [], []),
    (
        "update",
        header(
            [
                spec("prompts", "float32", [17, 1], 68),
                spec("tail.norm.weight", "float32", [0], 0),
                spec("tail.head.bias", "bfloat16", [3], 6),
            ],
            "update",
            {"round": 3, "attempt": 0, "samples": 25, "train_loss": 0.5, "local_loss": None},
        ),
        [struct.pack("<17f", *LONG), b"", b"".join(map(brain, BF16))],
        [LONG, [], BF16],
    ),
    (
        "meta-of-every-type",
        header(
            kind="größe",
            meta={"n": None, "b": True, "i": [-(2**63), 2**64 - 1], "f": 0.1, "m": {"s": "é"}},
        ),
        [],
        [],
    ),
]
OTHER_ORDER = {
    "tensors": [{"sizes": [4], "shape": [1], "codec": "float32", "name": "smashed"}],
    "meta": {"round": 1, "step": "1.0.0"},
    "kind": "forward",
}


def single(value):
    """A number rounded to binary32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def brains(*values):
    return b"".join(map(brain, values))


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


def halves(*values):
    return struct.pack(f"<{len(values)}e", *values)


def nibbles(*codes):
    """The bytes of a row of `int4`: code j below code H + j, with H the rounded-up half."""
    half = -(-len(codes) // 2)
    above = [*codes[half:], *[0] * (len(codes) % 2)]
    return bytes(low | high << 4 for low, high in zip(codes[:half], above, strict=True))


def sines(bits, norm, bound, codes):
    """What the codes −m … m of `cosine` stand for."""
    most = 2 ** (bits - 1) - 1
    return [single(norm * math.sin(code * bound / most)) for code in codes]


def zstd(content, size=None):
    """A Zstandard frame of one repeated byte: one segment, its size in one byte, one RLE block."""
    size = len(content) if size is None else size
    block = (1 | 1 << 1 | len(content) << 3).to_bytes(3, "little") + content[:1]
    return b"\x28\xb5\x2f\xfd\x20" + bytes([size]) + block


def one(codec, shape, *buffers):
    """The header and the buffers of a frame of one tensor."""
    return header([spec("smashed", codec, shape, *map(len, buffers))]), list(buffers)


LONG_ROW = [7.0, -7.0, 2.5, 1.5, *[0.0] * 60, 3.5, -1.75, 0.2]  # two groups: 64 and 3
THIRDS = 5, math.asin(4 / 5)  # norm and bound of (3, 4)
SIXTH = 2, math.asin(1 / 2)  # of two times (1, -1)

# Name, frame, the decoded values; where a sender makes these very bytes of other numbers, those;
# None where it need not make these bytes of any.
LOSSY = [
    (
        "int8",
        one(
            "int8",
            [2, 2, 3],
            struct.pack("<12b", 127, 2, -2, 0, 0, 0, -127, 0, 2, 0, 0, 0),
            floats(1, 0, 0.5, 0),
        ),
        [127.0, 2.0, -2.0, 0.0, 0.0, 0.0, -63.5, 0.0, 1.0, 0.0, 0.0, 0.0],
        [127.0, 2.5, -1.5, 0.0, 0.0, 0.0, -63.5, 0.25, 0.75, 2.0**-120, 0.0, -(2.0**-121)],
    ),
    ("int8-empty", one("int8", [3, 0], b"", b""), [], []),
    (
        "int4",
        one(
            "int4",
            [1, 67],
            nibbles(15, 1, 10, 10, *[8] * 60, 15, 4, 8),
            brains(1, 0.5),
        ),
        [7.0, -7.0, 2.0, 2.0, *[0.0] * 60, 3.5, -2.0, 0.0],
        LONG_ROW,
    ),
    (
        # 7 + 7 / 256 over 7 lies half way between the bfloat16 numbers 1 and 1 + 1 / 128.
        "int4-rows",
        one("int4", [3, 2], nibbles(15, 9) + nibbles(8, 8) + nibbles(1, 15), brains(1, 0, 2)),
        [7.0, 1.0, 0.0, 0.0, -14.0, 14.0],
        [7.02734375, 0.6, 0.0, 2.0**-130, -14.0, 13.1],
    ),
    (
        "int4-asym",
        one(
            "int4-asym",
            [3, 4],
            nibbles(0, 15, 2, 1) + nibbles(0, 0, 0, 0) + nibbles(0, 15, 8, 7),
            brains(1, 0, 0.5),
            brains(1, -3, -4),
        ),
        [1.0, 16.0, 3.0, 2.0, -3.0, -3.0, -3.0, -3.0, -4.0, 3.5, 0.0, -0.5],
        [1.0, 16.0, 3.5, 2.4, -3.0, -3.0, -3.0, -3.0, -4.0, 3.5, 0.1, -0.6],
    ),
    (
        # The minimum −1 − 1 / 256 is cut down to −1 − 1 / 128; 15 + 1 / 128 over 15 is cut up.
        "int4-asym-cut",
        one("int4-asym", [3], nibbles(0, 15, 1), brains(1.0078125), brains(-1.0078125)),
        [-1.0078125, 14.109375, 0.0],
        [-1.00390625, 14.0, 0.0],
    ),
    (
        "pq",
        one("pq", [2, 5], bytes([2, 0, 1, 3]), floats(*range(16))),
        [8.0, 9.0, 10.0, 11.0, 0.0, 4.0, 5.0, 6.0, 7.0, 12.0],
        None,
    ),
    (
        # Three of five: −4, and the first two of magnitude 2.
        "topk",
        one("topk:0.5", [5], struct.pack("<3I", 0, 2, 3), brains(2, -2, -4)),
        [2.0, 0.0, -2.0, -4.0, 0.0],
        [2.0, 1.0, -2.0, -4.0, 2.0],
    ),
    (
        # 1 + 1 / 256 lies half way between bfloat16 numbers, and so does 1 + 3 / 256.
        "topk-all",
        one("topk:1.0", [2, 1], struct.pack("<2I", 0, 1), brains(1, -1.015625)),
        [1.0, -1.015625],
        [1.00390625, -1.01171875],
    ),
    (
        "cosine-2",
        one("cosine:2", [5], bytes([0b00_01_10_00, 0b10]), struct.pack("<2d", *SIXTH)),
        sines(2, *SIXTH, [-1, 1, 0, -1, 1]),
        [-1.0, 1.0, 0.0, -1.0, 1.0],
    ),
    (
        "cosine-3",
        one("cosine:3", [1, 2], bytes([5, 6]), struct.pack("<2d", *THIRDS)),
        sines(3, *THIRDS, [2, 3]),
        [3.0, 4.0],
    ),
    (
        "cosine-4",
        one("cosine:4", [3], bytes([12 | 0 << 4, 7]), struct.pack("<2d", *THIRDS)),
        sines(4, *THIRDS, [5, -7, 0]),
        [3.0, -4.0, 0.0],
    ),
    ("cosine-zeros", one("cosine:8", [2], bytes([127, 127]), bytes(16)), [0.0, 0.0], [0.0, 0.0]),
    (
        "svd",
        one("svd:0.9", [2, 3], halves(1, 0.5), floats(4), halves(0.5, -0.25, 1)),
        [2.0, -1.0, 4.0, 1.0, -0.5, 2.0],
        None,
    ),
    ("svd-plain", one("svd:0.9", [3], floats(1, 2, 3)), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    ("svd-zeros", one("svd:0.9", [2, 3], b"", b"", b""), [0.0] * 6, [0.0] * 6),
    ("zstd-plain", one("float32+zstd", [1], floats(1) + b"\x00"), [1.0], [1.0]),
    (
        "zstd",
        one("int8+zstd", [1, 40], zstd(b"\x07" * 40) + b"\x01", floats(0.5) + b"\x00"),
        [3.5] * 40,
        None,
    ),
]

TWICE = b"\x83\xa4kind\xa1a\xa4meta\x82\xa1k\x01\xa1k\x02\xa7tensors\x90"  # {"k": 1, "k": 2}


def meta(packed):
    """A header whose meta is {"x": packed}."""
    return b"\x83\xa4kind\xa1a\xa4meta\x81\xa1x" + packed + b"\xa7tensors\x90"


def nested(depth):
    return b"\x91" * depth + b"\xc0"


good = frame(header([ONE]), [ONE_BUFFER])
INVALID = [
    ("nothing", b"", "malformed_frame", "no bytes"),
    ("short-prefix", good[:19], "malformed_frame", "less than the prefix"),
    ("truncated", good[:-64], "malformed_frame", "the last buffer is missing"),
    ("longer", good + bytes(64), "malformed_frame", "more bytes than the total length"),
    ("magic", frame(header(), magic=b"SFPG"), "malformed_frame", "wrong magic"),
    ("version", frame(header(), version=2), "unsupported_version", "version 2"),
    ("reserved", frame(header(), reserved=1), "malformed_frame", "reserved is not zero"),
    ("header-length", frame(header(), length=262_145), "too_large", "header over its limit"),
    ("header-past-end", frame(header(), length=4096), "malformed_frame", "header past the end"),
    ("total", frame(header(), total=2**63), "malformed_frame", "total is not the real length"),
    ("header-padding", frame(header(), pad=b"\x01"), "malformed_frame", "padding is not zero"),
    (
        "buffer-padding",
        frame(header([ONE]), [ONE_BUFFER], pad=b"\x01"),
        "malformed_frame",
        "padding is not zero",
    ),
    ("unowned", frame(header(), [bytes(64)]), "malformed_frame", "bytes that no tensor owns"),
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
    ("key-twice", frame(TWICE), "malformed_frame", "a key twice in one map"),
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
        frame(header([{**ONE, "strides": [1]}]), [ONE_BUFFER]),
        "malformed_frame",
        "an unknown key in a tensor's description",
    ),
    (
        "unnamed",
        frame(header([spec("", "float32", [1], 4)]), [ONE_BUFFER]),
        "malformed_frame",
        "a tensor without a name",
    ),
    (
        "codec",
        frame(header([spec("smashed", "pickle", [1], 4)]), [ONE_BUFFER]),
        "unknown_codec",
        "no such codec",
    ),
    (
        "size",
        frame(header([spec("smashed", "float32", [2], 4)]), [ONE_BUFFER]),
        "malformed_frame",
        "4 bytes for two float32",
    ),
    (
        "size-huge",
        frame(header([spec("smashed", "float32", [2**20], 2**22)]), [ONE_BUFFER]),
        "malformed_frame",
        "a buffer past the end of the frame",
    ),
    (
        "two-buffers",
        frame(header([spec("smashed", "float32", [2], 4, 4)]), [ONE_BUFFER, ONE_BUFFER]),
        "malformed_frame",
        "two buffers for a raw codec",
    ),
    (
        "negative",
        frame(header([spec("smashed", "float32", [-1], 4)]), [ONE_BUFFER]),
        "malformed_frame",
        "a negative dimension",
    ),
    (
        "boolean-dimension",
        frame(header([spec("smashed", "float32", [True], 4)]), [ONE_BUFFER]),
        "malformed_frame",
        "a dimension that is a boolean",
    ),
    (
        "dimensions",
        frame(header([spec("smashed", "float32", [1] * 6, 4)]), [ONE_BUFFER]),
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
        "dimensions that overflow, beside a zero",
    ),
    (
        "same-name",
        frame(header([ONE, ONE]), [ONE_BUFFER, ONE_BUFFER]),
        "malformed_frame",
        "two tensors of one name",
    ),
]


NAN, INFINITY = math.nan, math.inf
INVALID_CODECS = [
    *(
        (f"name-{name.replace(':', '-').replace('+', '-')}", one(name, [1], bytes(4)), why)
        for name, why in [
            ("topk:0", "a share of nothing"),
            ("topk:1.5", "a share above 1"),
            ("svd:0.0000001", "seven decimals"),
            ("svd:1e-1", "an exponent"),
            ("cosine:9", "nine bits"),
            ("int8:8", "a parameter for a codec without one"),
            ("pq+zstd+zstd", "the suffix twice"),
        ]
    ),
    ("int8-scale", one("int8", [1, 2], b"\x01\x02", floats(NAN)), "a scale of NaN"),
    ("int8-negative", one("int8", [1, 2], b"\x01\x02", floats(-1)), "a negative scale"),
    ("int8-huge", one("int8", [1, 2], b"\x01\x02", floats(2.0**120)), "a scale above 2^119"),
    ("int8-rows", one("int8", [2, 2], bytes(4), bytes(4)), "one scale for two rows"),
    ("int4-scale", one("int4", [2], b"\x88", brains(INFINITY)), "an infinite scale"),
    ("int4-unused", one("int4", [1], b"\x88", brains(1)), "an unused half that is not zero"),
    ("int4-groups", one("int4", [65], bytes(33), bytes(2)), "one scale for two groups"),
    (
        "int4-asym-minimum",
        one("int4-asym", [2], b"\x00", brains(1), brains(-INFINITY)),
        "an infinite minimum",
    ),
    ("pq-code", one("pq", [2, 4], b"\x00\x02", bytes(32)), "a code behind the codebook"),
    ("pq-codebook", one("pq", [4], b"\x00", floats(1, NAN, 0, 0)), "NaN in the codebook"),
    (
        "topk-falling",
        one("topk:0.5", [4], struct.pack("<2I", 2, 1), brains(1, 1)),
        "indices that do not rise",
    ),
    (
        "topk-twice",
        one("topk:0.5", [4], struct.pack("<2I", 1, 1), brains(1, 1)),
        "an index twice",
    ),
    (
        "topk-past-end",
        one("topk:0.5", [4], struct.pack("<2I", 1, 4), brains(1, 1)),
        "an index behind the tensor",
    ),
    (
        "topk-value",
        one("topk:0.5", [2], bytes(4), brains(INFINITY)),
        "an infinite value",
    ),
    (
        "cosine-code",
        one("cosine:3", [2], bytes([3, 7]), struct.pack("<2d", *THIRDS)),
        "the code that is left out",
    ),
    (
        "cosine-unused",
        one("cosine:4", [1], bytes([0x17]), struct.pack("<2d", *THIRDS)),
        "an unused bit that is not zero",
    ),
    (
        "cosine-bound",
        one("cosine:8", [1], bytes(1), struct.pack("<2d", 1, 1.6)),
        "a bound above a right angle",
    ),
    (
        "cosine-norm",
        one("cosine:8", [1], bytes(1), struct.pack("<2d", INFINITY, 0)),
        "an infinite norm",
    ),
    ("svd-rank", one("svd:0.9", [4, 5], bytes(8), bytes(4), bytes(20)), "factors of two ranks"),
    (
        "svd-large",
        one("svd:0.9", [4, 5], bytes(32), bytes(16), bytes(40)),
        "factors no smaller than the tensor",
    ),
    (
        "svd-vector",
        one("svd:0.9", [2, 3], halves(1, -1.5), floats(1), halves(0, 0, 1)),
        "an element above 1 in a singular vector",
    ),
    (
        "svd-value",
        one("svd:0.9", [2, 3], halves(1, 0), floats(-1), halves(0, 0, 1)),
        "a negative singular value",
    ),
    ("zstd-flag", one("float32+zstd", [1], floats(1) + b"\x02"), "a last byte of 2"),
    ("zstd-empty", one("float32+zstd", [0], b""), "a buffer without its last byte"),
    ("zstd-long", one("float32+zstd", [1], bytes(6)), "a buffer two bytes too long"),
    ("zstd-no-frame", one("uint8+zstd", [40], bytes(20) + b"\x01"), "no frame"),
    (
        "zstd-size",
        one("uint8+zstd", [40], zstd(b"\x07" * 40, size=41) + b"\x01"),
        "a size that is not the codec's",
    ),
    (
        "zstd-short",
        one("uint8+zstd", [40], zstd(b"\x07" * 39, size=40) + b"\x01"),
        "less content than the frame says",
    ),
    (
        "zstd-behind",
        one("uint8+zstd", [40], zstd(b"\x07" * 40) + b"\x00\x01"),
        "a byte behind the frame",
    ),
    (
        "zstd-no-gain",
        one("uint8+zstd", [10], zstd(b"\x07" * 10) + b"\x01"),
        "a frame as long as its content",
    ),
]


def described(name, head, values, canonical, given=None):
    tensors = [
        {
            "name": tensor["name"],
            "codec": tensor["codec"],
            "shape": tensor["shape"],
            "values": numbers,
        }
        for tensor, numbers in zip(head["tensors"], values, strict=True)
    ]
    if given is not None and given != values[0]:
        tensors[0]["input"] = given
    return {
        "file": f"{name}.bin",
        "canonical": canonical,
        "kind": head["kind"],
        "meta": head["meta"],
        "tensors": tensors,
    }


def main():
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.bin"):
        old.unlink()
    valid, invalid = [], []
    for name, head, buffers, values in VALID:
        (FOLDER / f"{name}.bin").write_bytes(frame(head, buffers))
        valid.append(described(name, head, values, canonical=True))
    for name, (head, buffers), values, given in LOSSY:
        (FOLDER / f"{name}.bin").write_bytes(frame(head, buffers))
        valid.append(described(name, head, [values], canonical=given is not None, given=given))
    (FOLDER / "other-order.bin").write_bytes(frame(OTHER_ORDER, [ONE_BUFFER]))
    valid.append(described("other-order", OTHER_ORDER, [[1.0]], canonical=False))
    for name, data, code, why in INVALID:
        (FOLDER / f"invalid-{name}.bin").write_bytes(data)
        invalid.append({"file": f"invalid-{name}.bin", "code": code, "why": why})
    for name, (head, buffers), why in INVALID_CODECS:
        code = "unknown_codec" if name.startswith("name-") else "malformed_frame"
        (FOLDER / f"invalid-{name}.bin").write_bytes(frame(head, buffers))
        invalid.append({"file": f"invalid-{name}.bin", "code": code, "why": why})
    content = {"version": 1, "valid": valid, "invalid": invalid}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (FOLDER / "vectors.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
