"""Find similar pictures by a difference hash and a thumbnail of each.

The hash has a bit for each pair of neighbouring cells of a coarse grid, across and down: whether
the second is clearly brighter (dHash, http://www.hackerfactor.com/blog/?/archives/529). Pairs with
similar hashes are then compared by their thumbnails, which differ even for simple drawings.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_client.data.pictures import Pixels

MAX_PICTURES = 20_000  # the number of compared pairs grows with the square of this

_GRID = 8

_BRIGHTER = 3  # on a scale of 0 to 255: smaller differences are noise

_MAX_BITS = 12  # differing bits of two hashes of 128 bits

_THUMBNAIL = 16  # pixels a side

_MAX_MEAN, _MAX_PIXEL = 6.0, 48.0  # differences of two thumbnails, on a scale of 0 to 255

_BLOCK = 1024


def describe_picture(pixels: Pixels) -> tuple[NDArray[np.uint64], Pixels]:
    """Return a picture's difference hash, uint64 [2], and grey thumbnail, uint8 [16, 16]."""
    grey = Image.fromarray(pixels).convert("L")
    wide = np.asarray(grey.resize((_GRID + 1, _GRID), Image.Resampling.BOX)).astype(int)
    tall = np.asarray(grey.resize((_GRID, _GRID + 1), Image.Resampling.BOX)).astype(int)
    across = np.diff(wide, axis=1) >= _BRIGHTER  # [8, 8]
    down = np.diff(tall, axis=0) >= _BRIGHTER  # [8, 8]
    bits = np.packbits(np.concatenate([across.ravel(), down.ravel()]))
    thumbnail = np.asarray(grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX))
    return bits.view(np.uint64), thumbnail


def find_similar(
    hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8]
) -> Iterator[tuple[int, int]]:
    """Yield each pair of similar pictures once, as two positions.

    Args:
        hashes: uint64 [n, 2].
        thumbnails: uint8 [n, 16, 16].
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
                if first < second and _are_similar(thumbnails[first], thumbnails[second]):
                    yield first, second


def _are_similar(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    difference = np.abs(one.astype(np.int16) - other)
    return bool(difference.mean() <= _MAX_MEAN and difference.max() <= _MAX_PIXEL)
