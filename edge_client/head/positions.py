"""Rotary positions and relative position biases in NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_client.head.layers import Floats
from protocol.architecture import Architecture, Rotary


class Turns:
    """Turns queries and keys by their patches' positions.

    Args:
        rotary: of the architecture.
        angles: of each patch and pair, [N, pairs] or [heads, N, pairs].
        prefix: leading tokens that are not turned.
    """

    def __init__(self, rotary: Rotary, angles: Floats, prefix: int) -> None:
        self._is_half = rotary.layout == "half"
        self._sines, self._cosines = np.sin(angles), np.cos(angles)
        self._prefix = prefix

    def __call__(self, heads: Floats) -> Floats:
        """Return a turned copy of queries or keys [B, H, T, d]."""
        turned = np.ascontiguousarray(heads)
        if turned is heads:
            turned = heads.copy()
        image = turned[..., self._prefix :, :]
        pairs = image.shape[-1] // 2
        if self._is_half:
            first, second = image[..., :pairs], image[..., pairs:]
        else:
            first, second = image[..., ::2], image[..., 1::2]
        new_first = first * self._cosines - second * self._sines
        second[...] = second * self._cosines + first * self._sines
        first[...] = new_first
        return turned


def turns_of(architecture: Architecture, tensors: Mapping[str, Floats], block: int) -> Turns | None:
    """Return the rotary positions of a block; None: the backbone has none."""
    rotary = architecture.rotary
    if rotary is None:
        return None
    rows, columns = architecture.grid
    y = np.repeat(np.arange(rows, dtype=np.float64), columns)[:, None]  # [N, 1]
    x = np.tile(np.arange(columns, dtype=np.float64), rows)[:, None]
    if rotary.learned is not None:
        first, second = tensors["rope.freqs"][:, block].astype(np.float64)[:, :, None]
        along_x, along_y = (first, second) if rotary.learned == "column-row" else (second, first)
        angles = x * along_x + y * along_y  # [heads, N, pairs]
    else:
        angles = np.array(rotary.start) + y * np.array(rotary.row) + x * np.array(rotary.column)
    return Turns(rotary, angles.astype(np.float32), architecture.prefix_tokens)


def relative_bias(
    architecture: Architecture, tensors: Mapping[str, Floats], block: int
) -> Floats | None:
    """Return what is added to a block's attention scores, [H, T, T]; None: nothing.

    Source: BEiT (arXiv 2106.08254): a table has a row for each offset of two patches, and three for
    pairs with the class token.
    """
    if not architecture.relative:
        return None
    names = (
        f"blocks.{block}.attn.relative_position_bias_table",
        "rel_pos_bias.relative_position_bias_table",
    )
    tables = [tensors[name] for name in names if name in tensors]
    if not tables:
        return None
    index = _offsets(*architecture.grid)
    bias = np.sum([table[index] for table in tables], axis=0)  # [T, T, H]
    return np.ascontiguousarray(bias.transpose(2, 0, 1), np.float32)


def _offsets(rows: int, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return the table's row for each pair of tokens, [1 + N, 1 + N], the class token first."""
    y = np.repeat(np.arange(rows), columns)
    x = np.tile(np.arange(columns), rows)
    width = 2 * columns - 1
    distances = (2 * rows - 1) * width
    index = np.empty((1 + len(y), 1 + len(y)), np.int64)
    index[1:, 1:] = (y[:, None] - y + rows - 1) * width + (x[:, None] - x + columns - 1)
    index[0, :] = distances
    index[:, 0] = distances + 1
    index[0, 0] = distances + 2
    return index
