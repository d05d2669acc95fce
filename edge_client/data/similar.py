"""Find pictures that look alike, by a difference hash and a small grey copy of each.

The hash has a bit for each pair of neighbouring cells of a coarse grid, across and down: whether
the second is clearly brighter (dHash, http://www.hackerfactor.com/blog/?/archives/529). Pairs of
near hashes are compared by their copies, which tells drawings of few lines apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_client.data.pictures import Pixels

MAX_PICTURES = 20_000  # pairs are compared one by one: their number grows with the square

_GRID = 8

_BRIGHTER = 3  # of 255: smaller differences are noise

_MAX_BITS = 12  # of 128 that differ

_COPY = 16  # side of the grey copy

_MAX_MEAN, _MAX_PIXEL = 6.0, 48.0  # largest differences of two copies, of 255

_BLOCK = 1024


def look_of(pixels: Pixels) -> tuple[NDArray[np.uint64], Pixels]:
    """Return a picture's difference hash, uint64 [2], and its grey copy, uint8 [16, 16]."""
    grey = Image.fromarray(pixels).convert("L")
    wide = np.asarray(grey.resize((_GRID + 1, _GRID), Image.Resampling.BOX)).astype(int)
    tall = np.asarray(grey.resize((_GRID, _GRID + 1), Image.Resampling.BOX)).astype(int)
    across = np.diff(wide, axis=1) >= _BRIGHTER  # [8, 8]
    down = np.diff(tall, axis=0) >= _BRIGHTER  # [8, 8]
    bits = np.packbits(np.concatenate([across.ravel(), down.ravel()]))
    copy = np.asarray(grey.resize((_COPY, _COPY), Image.Resampling.BOX))
    return bits.view(np.uint64), copy


def near_pairs(hashes: NDArray[np.uint64], copies: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of positions whose pictures look alike, each once.

    Args:
        hashes: uint64 [n, 2].
        copies: uint8 [n, 16, 16].
    """
    table = np.array([bin(value).count("1") for value in range(256)], np.uint8)
    count = len(hashes)
    for start in range(0, count, _BLOCK):
        rows = hashes[start : start + _BLOCK]
        for other in range(start, count, _BLOCK):
            columns = hashes[other : other + _BLOCK]
            changed = (rows[:, None] ^ columns[None]).view(np.uint8)  # [r, c, 16]
            near = table[changed].sum(axis=-1, dtype=np.uint16) <= _MAX_BITS
            for row, column in np.argwhere(near):
                first, second = start + int(row), other + int(column)
                if first < second and _look_alike(copies[first], copies[second]):
                    yield first, second


def _look_alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    difference = np.abs(one.astype(np.int16) - other)
    return bool(difference.mean() <= _MAX_MEAN and difference.max() <= _MAX_PIXEL)
