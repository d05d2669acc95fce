"""Builders of frames and codec buffers, byte by byte, without the package `protocol`."""

import math
import struct

import msgpack
from xxhash import xxh3_64_intdigest

from tests.protocol_vectors import rans


def padded(data):
    return data + bytes(-len(data) % 64)


def frame(
    header,
    buffers=(),
    *,
    magic=b"SFPF",
    version=2,
    reserved=0,
    length=None,
    total=None,
    pad=None,
    flip=None,
):
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    length = len(packed) if length is None else length
    body = packed + bytes(-(28 + len(packed)) % 64) + b"".join(padded(b) for b in buffers)
    total = 28 + len(body) if total is None else total
    prefix = struct.pack("<4sHHIQ", magic, version, reserved, length, total)
    body = body if pad is None else body[:-1] + pad
    data = bytearray(prefix + struct.pack("<Q", xxh3_64_intdigest(prefix + body)) + body)
    if flip is not None:
        data[flip] ^= 1
    return bytes(data)


def header(tensors=(), kind="forward", meta=None):
    meta = {"step": "1.0.0", "round": 1} if meta is None else meta
    return {"kind": kind, "meta": meta, "tensors": list(tensors)}


def spec(name, codec, shape, *sizes):
    return {"name": name, "codec": codec, "shape": list(shape), "sizes": list(sizes)}


def brain(value):
    """Encode a value as bfloat16; it must be exact."""
    return struct.pack("<f", value)[2:]


def single(value):
    """Round a number to binary32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def brains(*values):
    return b"".join(map(brain, values))


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


def halves(*values):
    return struct.pack(f"<{len(values)}e", *values)


def nibbles(*codes):
    """Pack a row of `int4` codes: code j in the low, code H + j in the high half of byte j."""
    half = -(-len(codes) // 2)
    high_codes = [*codes[half:], *[0] * (len(codes) % 2)]
    return bytes(low | high << 4 for low, high in zip(codes[:half], high_codes, strict=True))


def sines(bits, norm, bound, codes):
    """Decode the codes −m … m of `cosine`."""
    max_code = 2 ** (bits - 1) - 1
    return [single(norm * math.sin(code * bound / max_code)) for code in codes]


def zstd(content, size=None):
    """Build a Zstandard frame of one repeated byte: one segment, a one-byte size, one RLE block."""
    size = len(content) if size is None else size
    block = (1 | 1 << 1 | len(content) << 3).to_bytes(3, "little") + content[:1]
    return b"\x28\xb5\x2f\xfd\x20" + bytes([size]) + block


def single_tensor(codec, shape, *buffers):
    """Return the header and the buffers of a frame with one tensor."""
    return header([spec("smashed", codec, shape, *map(len, buffers))]), list(buffers)


def klt(shape, steps, tables, matrix, codes, extra=b""):
    """Build a `klt` tensor; the codes begin with those of the positions' means."""
    words = rans.encode(matrix, tables[: len(steps)]) + rans.encode(codes, tables[len(steps) :])
    return single_tensor("klt:1", shape, brains(*steps), b"".join(tables), words + extra)


UNIT_SPEC = spec("smashed", "float32", [1], 4)

UNIT_BUFFER = struct.pack("<f", 1.0)

THIRDS = 5, math.asin(4 / 5)  # norm and bound of (3, 4)
