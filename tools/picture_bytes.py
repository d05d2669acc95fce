"""Bytes of picture files that Pillow cannot write: 16-bit PNG and TIFF, colour profiles."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

_GAMMA = 563 / 256  # Adobe RGB (1998)'s exponent, as profiles write it

# Columns of D50-adapted colorants: Adobe RGB (1998), and the inverse of sRGB's.
_ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
_TO_SRGB = np.array(
    [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
)


def png(values: Numbers, colour_type: int, *, depth: int = 16, chunks: bytes = b"") -> bytes:
    """Write a PNG without filters.

    Args:
        values: [H, W] or [H, W, C].
        colour_type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
        depth: bits of a number.
        chunks: further chunks.
    """
    height, width = values.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    elif depth == 8:
        rows = [row.astype(np.uint8).tobytes() for row in values]
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.ravel()).tobytes() for row in bits]
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", head)
        + chunks
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )


def png_chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(
    values: Numbers, *, photometric: int, extra: tuple[int, ...] = (), compress: bool = False
) -> bytes:
    """Write a little-endian TIFF of one strip.

    Args:
        values: [H, W] or [H, W, C], of the numbers' type in the file.
        photometric: 0 white is zero, 1 black is zero, 2 RGB.
        extra: kinds of the extra samples: 1 premultiplied alpha, 2 alpha.
        compress: with zlib.
    """
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    if compress:
        data = zlib.compress(data)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [values.dtype.itemsize * 8] * samples),
        259: (3, [8 if compress else 1]),
        262: (3, [photometric]),
        273: (4, [8]),
        277: (3, [samples]),
        278: (4, [height]),
        279: (4, [len(data)]),
        339: (3, [kind] * samples),
    }
    if extra:
        tags[338] = (3, list(extra))
    base = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries, overflow = struct.pack("<H", len(tags)), b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = b"".join(struct.pack("<H" if kind == 3 else "<I", number) for number in numbers)
        if len(packed) > 4:
            packed, overflow = struct.pack("<I", base + len(overflow)), overflow + packed
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + entries + struct.pack("<I", 0) + overflow


def adobe_rgb() -> bytes:
    """Return a profile of a wide gamut: Adobe RGB (1998)."""
    colorants = {
        name: b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), _ADOBE.T, strict=True)
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(_GAMMA * 256)) + b"\0\0"
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return _profile(b"mntr", b"RGB ", b"XYZ ", b"wide gamut", {**colorants, **curves})


def adobe_rgb_in_srgb(pixels: Numbers) -> Numbers:
    """Convert colours of `adobe_rgb` to sRGB by the written-out formulas; uint8 [..., 3]."""
    linear = (pixels / 255.0) ** _GAMMA @ (_TO_SRGB @ _ADOBE).T
    linear = linear.clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    converted: Numbers = (curved * 255 + 0.5).astype(np.uint8)
    return converted


# Lab of the corners of the CMYK cube: each ink alone, and their overprints.
_INKS = {
    (0, 0, 0, 0): (100, 0, 0),
    (1, 0, 0, 0): (55, -37, -50),
    (0, 1, 0, 0): (48, 74, -3),
    (0, 0, 1, 0): (89, -5, 93),
    (1, 1, 0, 0): (24, 17, -46),
    (1, 0, 1, 0): (50, -65, 27),
    (0, 1, 1, 0): (47, 68, 48),
    (1, 1, 1, 0): (23, 0, 0),
}


def ink_lab(corner: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Return the colour, in Lab, of a corner of `print_profile`: black over all else is black."""
    return (0, 0, 0) if corner[3] else _INKS[corner]


def print_profile() -> bytes:
    """Return a profile of a printer's CMYK: a table of two points on each axis."""
    table = b""
    for number in range(16):
        bits = [number >> shift & 1 for shift in (3, 2, 1, 0)]
        lightness, a, b = ink_lab((bits[0], bits[1], bits[2], bits[3]))
        table += bytes([round(lightness * 2.55), a + 128, b + 128])
    identity = bytes(range(256))
    matrix = b"".join(_fixed(value) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + table + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", b"press", {b"A2B0": lut})


def _profile(kind: bytes, space: bytes, pcs: bytes, name: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC profile of version 2."""
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 79
    white = b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in (0.9642, 1.0, 0.8249))
    tags = {
        b"desc": description,
        b"wtpt": white,
        b"cprt": b"text\0\0\0\0free\0",
        **tags,
    }
    offset = 128 + 4 + 12 * len(tags)
    index, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        index += tag + struct.pack(">II", offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = offset + len(body)
    head = struct.pack(">I4sI", size, b"none", 0x02400000) + kind + space + pcs
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    head += b"".join(_fixed(value) for value in (0.9642, 1.0, 0.8249))
    return head.ljust(128, b"\0") + index + body


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))
