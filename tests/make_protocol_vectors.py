"""Write protocol/vectors anew: python tests/make_protocol_vectors.py

The bytes are laid out here by hand after SPEC.md, without the package, so that the vectors are a
second opinion on it and not its echo.
"""

import json
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


def described(name, head, values, canonical):
    tensors = [
        {
            "name": tensor["name"],
            "codec": tensor["codec"],
            "shape": tensor["shape"],
            "values": numbers,
        }
        for tensor, numbers in zip(head["tensors"], values, strict=True)
    ]
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
    (FOLDER / "other-order.bin").write_bytes(frame(OTHER_ORDER, [ONE_BUFFER]))
    valid.append(described("other-order", OTHER_ORDER, [[1.0]], canonical=False))
    for name, data, code, why in INVALID:
        (FOLDER / f"invalid-{name}.bin").write_bytes(data)
        invalid.append({"file": f"invalid-{name}.bin", "code": code, "why": why})
    content = {"version": 1, "valid": valid, "invalid": invalid}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (FOLDER / "vectors.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
