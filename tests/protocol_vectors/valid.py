"""Valid frames, and their decoded values."""

import math
import struct

from tests.protocol_vectors import rans
from tests.protocol_vectors.by_hand import (
    THIRDS,
    UNIT_BUFFER,
    brain,
    brains,
    floats,
    halves,
    header,
    klt,
    nibbles,
    sines,
    single_tensor,
    spec,
    zstd,
)

F32 = [0.0, 1.0, -2.5, 0.15625, 3.4028234663852886e38, 1.401298464324817e-45]

F16 = [0.0, -1.0, 65504.0, 5.960464477539063e-08]

BF16 = [1.0, -0.5, 3.3895313892515355e38]

I64 = [0, -1, 9007199254740991, -9007199254740991]

LONG = [float(number) for number in range(17)]  # 68 bytes: more than one block of 64

f32 = struct.pack("<6f", *F32)

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
    ("scalar", header([spec("smashed", "float32", [], 4)]), [UNIT_BUFFER], [[1.0]]),
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

LONG_ROW = [7.0, -7.0, 2.5, 1.5, *[0.0] * 60, 3.5, -1.75, 0.2]  # two groups: 64 and 3

SIXTH = 2, math.asin(1 / 2)  # of two times (1, -1)

# Name, frame, decoded values, and the values that a sender encodes to these bytes; None if a sender
# need not produce these bytes.
LOSSY = [
    (
        "int8",
        single_tensor(
            "int8",
            [2, 2, 3],
            struct.pack("<12b", 127, 2, -2, 0, 0, 0, -127, 0, 2, 0, 0, 0),
            floats(1, 0, 0.5, 0),
        ),
        [127.0, 2.0, -2.0, 0.0, 0.0, 0.0, -63.5, 0.0, 1.0, 0.0, 0.0, 0.0],
        [127.0, 2.5, -1.5, 0.0, 0.0, 0.0, -63.5, 0.25, 0.75, 2.0**-120, 0.0, -(2.0**-121)],
    ),
    ("int8-empty", single_tensor("int8", [3, 0], b"", b""), [], []),
    (
        "int4",
        single_tensor(
            "int4",
            [1, 67],
            nibbles(15, 1, 10, 10, *[8] * 60, 15, 4, 8),
            brains(1, 0.5),
        ),
        [7.0, -7.0, 2.0, 2.0, *[0.0] * 60, 3.5, -2.0, 0.0],
        LONG_ROW,
    ),
    (
        # 7 + 7 / 256 over 7 is half way between the bfloat16 numbers 1 and 1 + 1 / 128.
        "int4-rows",
        single_tensor(
            "int4", [3, 2], nibbles(15, 9) + nibbles(8, 8) + nibbles(1, 15), brains(1, 0, 2)
        ),
        [7.0, 1.0, 0.0, 0.0, -14.0, 14.0],
        [7.02734375, 0.6, 0.0, 2.0**-130, -14.0, 13.1],
    ),
    (
        "int4-asym",
        single_tensor(
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
        # The minimum −1 − 1 / 256 is rounded down to −1 − 1 / 128, the scale (15 + 1 / 128) / 15 up
        "int4-asym-cut",
        single_tensor("int4-asym", [3], nibbles(0, 15, 1), brains(1.0078125), brains(-1.0078125)),
        [-1.0078125, 14.109375, 0.0],
        [-1.00390625, 14.0, 0.0],
    ),
    (
        "pq",
        single_tensor("pq", [2, 5], bytes([2, 0, 1, 3]), floats(*range(16))),
        [8.0, 9.0, 10.0, 11.0, 0.0, 4.0, 5.0, 6.0, 7.0, 12.0],
        None,
    ),
    (
        # Three of five: −4, and the first two of magnitude 2.
        "topk",
        single_tensor("topk:0.5", [5], struct.pack("<3I", 0, 2, 3), brains(2, -2, -4)),
        [2.0, 0.0, -2.0, -4.0, 0.0],
        [2.0, 1.0, -2.0, -4.0, 2.0],
    ),
    (
        # 1 + 1 / 256 and 1 + 3 / 256 are both half way between bfloat16 numbers.
        "topk-all",
        single_tensor("topk:1.0", [2, 1], struct.pack("<2I", 0, 1), brains(1, -1.015625)),
        [1.0, -1.015625],
        [1.00390625, -1.01171875],
    ),
    (
        "cosine-2",
        single_tensor("cosine:2", [5], bytes([0b00_01_10_00, 0b10]), struct.pack("<2d", *SIXTH)),
        sines(2, *SIXTH, [-1, 1, 0, -1, 1]),
        [-1.0, 1.0, 0.0, -1.0, 1.0],
    ),
    (
        "cosine-3",
        single_tensor("cosine:3", [1, 2], bytes([5, 6]), struct.pack("<2d", *THIRDS)),
        sines(3, *THIRDS, [2, 3]),
        [3.0, 4.0],
    ),
    (
        "cosine-4",
        single_tensor("cosine:4", [3], bytes([12 | 0 << 4, 7]), struct.pack("<2d", *THIRDS)),
        sines(4, *THIRDS, [5, -7, 0]),
        [3.0, -4.0, 0.0],
    ),
    (
        "cosine-zeros",
        single_tensor("cosine:8", [2], bytes([127, 127]), bytes(16)),
        [0.0, 0.0],
        [0.0, 0.0],
    ),
    (
        "svd",
        single_tensor("svd:0.9", [2, 3], halves(1, 0.5), floats(4), halves(0.5, -0.25, 1)),
        [2.0, -1.0, 4.0, 1.0, -0.5, 2.0],
        None,
    ),
    ("svd-plain", single_tensor("svd:0.9", [3], floats(1, 2, 3)), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    ("svd-zeros", single_tensor("svd:0.9", [2, 3], b"", b"", b""), [0.0] * 6, [0.0] * 6),
    ("klt-plain", single_tensor("klt:1", [3], floats(1, 2, 3)), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    (
        # The mean token alone: ten tokens of 2, −4, 0, 6
        "klt-mean",
        klt([5, 2, 4], [2.0], [rans.table(3, 64, 100)], [[1], [-2], [0], [3]], [[]] * 10),
        [2.0, -4.0, 0.0, 6.0] * 10,
        None,
    ),
    (
        # 0.5 · (1, …) + 2 · (1, …) · c: no position has a mean
        "klt",
        klt(
            [12, 8],
            [0.5, 2.0],
            [*[rans.table(1, 100, 100)] * 2, rans.table(4, 128, 90)],
            [[1, 1]] * 8,
            [[code] for code in (0, 0, 1, 0, -2, 4, 0, 0, -1, 0, 3, 0)],
        ),
        [0.5 + 2.0 * code for code in (0, 0, 1, 0, -2, 4, 0, 0, -1, 0, 3, 0) for _ in range(8)],
        None,
    ),
    (
        # Two positions with the means 2 and −1, four samples
        "klt-positions",
        klt(
            [4, 2, 8],
            [0.5, 2.0],
            [*[rans.table(1, 100, 100)] * 2, rans.table(2, 128, 90)],
            [[1, 1]] * 8,
            [[code] for code in (2, -1, 0, 0, 1, 0, -2, 1, 0, 0)],
        ),
        [0.5 + 2.0 * code for code in (2, -1, 3, -1, 0, 0, 2, -1) for _ in range(8)],
        None,
    ),
    (
        # From 32 samples on the means are quarters: 0.5 and −0.25
        "klt-quarters",
        klt(
            [32, 2, 2],
            [0.5, 2.0],
            [*[rans.table(1, 100, 100)] * 2, rans.table(2, 230, 90)],
            [[1, 1]] * 2,
            [[2], [-1], *[[row % 7 // 6] for row in range(64)]],
        ),
        [0.5 + 2.0 * (row % 7 // 6 + (0.5, -0.25)[row % 2]) for row in range(64) for _ in range(2)],
        None,
    ),
    ("zstd-plain", single_tensor("float32+zstd", [1], floats(1) + b"\x00"), [1.0], [1.0]),
    (
        "zstd",
        single_tensor("int8+zstd", [1, 40], zstd(b"\x07" * 40) + b"\x01", floats(0.5) + b"\x00"),
        [3.5] * 40,
        None,
    ),
]
