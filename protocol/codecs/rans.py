"""Entropy coding of integer matrices: interleaved rANS with a geometric model of each column.

All arithmetic is on integers, so that every machine decodes the same codes. Each lane codes every
``lanes``-th row with its own state; all lanes share one stream of words.

Source: Duda, Asymmetric numeral systems, arXiv 1311.2540; Giesen, Interleaved entropy coders, arXiv
1402.3392.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol.errors import MalformedFrame

__all__ = [
    "MAX_REACH",
    "TABLE_BYTES",
    "decode_columns",
    "encode_columns",
    "fit_tables",
    "lookup_bytes",
    "reaches",
]

TABLE_BYTES: Final = 4  # reach (16 bits), share of zeros, decay

MAX_REACH: Final = 16_383  # largest magnitude of a code: every code has a frequency of at least 1

MAX_TOTAL_REACH: Final = 131_072  # sum over the columns: bounds the tables' memory

_BITS = 16  # the frequencies of a table sum to 2¹⁶; a word has as many bits

_TOTAL = 1 << _BITS

_LOWEST = np.uint64(1 << 32)  # a lane's state lies in [2³², 2⁴⁸), and starts here

_SHIFT, _FULL, _MASK = np.uint64(_BITS), np.uint64(32), np.uint64(_TOTAL - 1)

_STATE_WORDS = 3

_CODES_PER_LANE = 2048  # at least; a lane costs 6 bytes, and all lanes are one vector operation

_MAX_LANES = 4096

_LOOKUP_ROWS = 8192  # from this number on, a column's lookup table saves time

_MAX_LOOKUPS = 512  # tables of 128 KiB each; binary search for further columns

_TABLE = np.dtype([("reach", "<u2"), ("zeros", "u1"), ("decay", "u1")])

Codes = NDArray[np.int16]

Words = NDArray[np.uint16]

Tables = NDArray[Any]  # dtype `_TABLE`


def fit_tables(codes: NDArray[np.int32]) -> bytes | None:
    """Return the table of each column of ``codes`` [rows, columns]; None: a limit is exceeded.

    A table has the column's largest magnitude, its share of zeros, and the decay of the frequencies
    from one magnitude to the next, which is fitted to the mean magnitude of the other codes.
    """
    tables = np.zeros(codes.shape[1], _TABLE)
    magnitudes = np.abs(codes.astype(np.int64))
    reach = magnitudes.max(axis=0, initial=0)
    if reach.max(initial=0) > MAX_REACH or reach.sum() > MAX_TOTAL_REACH:
        return None
    nonzero = np.maximum(np.count_nonzero(codes, axis=0), 1)
    decay = np.sqrt(nonzero / np.maximum(magnitudes.sum(axis=0), 1))  # 1 − ratio, as a root
    tables["reach"] = reach
    tables["zeros"] = np.clip(np.rint(256 * (1 - nonzero / max(len(codes), 1))), 0, 255)
    tables["decay"] = np.clip(np.rint(256 * decay), 1, 255)
    return tables.tobytes()


def lookup_bytes(rows: int, columns: int) -> int:
    """Return the bytes of the lookup tables for decoding a matrix."""
    return min(columns, _MAX_LOOKUPS) * _TOTAL * 2 if rows >= _LOOKUP_ROWS else 0


def reaches(tables: bytes | memoryview) -> NDArray[np.int64]:
    """Return the largest magnitude of each column's codes.

    Raises:
        MalformedFrame: a reach or their sum is above its limit.
    """
    reach: NDArray[np.int64] = np.frombuffer(tables, _TABLE)["reach"].astype(np.int64)
    if reach.max(initial=0) > MAX_REACH or reach.sum() > MAX_TOTAL_REACH:
        raise MalformedFrame(
            "the reach of a column, and of all columns, must be at most these limits",
            field="tables",
            limit=[MAX_REACH, MAX_TOTAL_REACH],
            value=[int(reach.max(initial=0)), int(reach.sum())],
        )
    return reach


def encode_columns(codes: NDArray[np.int32], tables: bytes) -> Words:
    """Encode ``codes`` [rows, columns] with the tables that `fit_tables` returned for them."""
    rows, columns = codes.shape
    reach = reaches(tables)
    models = [_cumulate(table) for table in np.frombuffer(tables, _TABLE)]
    sizes = [len(model) for model in models]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    starts = np.concatenate([np.empty(0, np.uint64), *models])
    widths = np.concatenate([np.empty(0, np.uint64), *map(_widths, models)])
    places = np.ascontiguousarray((codes + (offsets + reach)).T)  # [columns, rows]
    lanes = _count_lanes(rows, columns)
    states = np.full(lanes, _LOWEST)
    emitted: list[Words] = []
    for start in reversed(range(0, rows, lanes)):
        active = states[: min(lanes, rows - start)]  # a view
        for column in reversed(np.flatnonzero(reach)):
            place = places[column, start : start + lanes]
            width = widths[place]
            full = active >= width << _FULL
            if full.any():
                emitted.append((active[full] & _MASK).astype(np.uint16))
                active[full] >>= _SHIFT
            quotient, remainder = np.divmod(active, width)
            active[:] = (quotient << _SHIFT) + remainder + starts[place]
    return np.concatenate([_state_words(states), *reversed(emitted)])


def decode_columns(words: Words, rows: int, tables: bytes | memoryview) -> tuple[Codes, int]:
    """Decode a matrix from the beginning of ``words``.

    Returns:
        The codes [rows, columns], and the number of words read.

    Raises:
        MalformedFrame: a limit of `reaches` is exceeded, or no encoder writes these words.
    """
    reach = reaches(tables)
    lanes = _count_lanes(rows, len(reach))
    used = _STATE_WORDS * lanes
    if len(words) < used:
        raise _invalid_words("the words end before the states of all lanes", used, len(words))
    states = _read_states(words[:used])
    models = [_cumulate(table) for table in np.frombuffer(tables, _TABLE)]
    widths = [_widths(model) for model in models]
    codes = np.zeros((len(reach), rows), np.int16)
    columns = np.flatnonzero(reach)
    lookups = {}
    if rows >= _LOOKUP_ROWS:
        lookups = {column: _lookup(widths[column]) for column in columns[:_MAX_LOOKUPS]}
    for start in range(0, rows, lanes):
        active = states[: min(lanes, rows - start)]  # a view
        for column in columns:
            model, width = models[column], widths[column]
            slots = active & _MASK
            if (lookup := lookups.get(column)) is not None:
                found = lookup.take(slots.astype(np.intp), mode="clip").astype(np.intp)
            else:
                found = np.searchsorted(model, slots, side="right") - 1
            codes[column, start : start + lanes] = found - reach[column]
            active >>= _SHIFT
            active *= width.take(found, mode="clip")
            active += slots
            active -= model.take(found, mode="clip")
            low = active < _LOWEST
            count = int(np.count_nonzero(low))
            if count:
                if used + count > len(words):
                    raise _invalid_words("the words end before the codes", used + count, len(words))
                active[low] = (active[low] << _SHIFT) | words[used : used + count]
                used += count
    if (states != _LOWEST).any():
        raise _invalid_words("a lane does not end in its first state", int(_LOWEST), None)
    return codes.T, used


def _count_lanes(rows: int, columns: int) -> int:
    """Return the number of lanes of a matrix; both ends compute it from the shape."""
    return max(1, min(rows, _MAX_LANES, rows * columns // _CODES_PER_LANE))


def _cumulate(table: Any) -> NDArray[np.uint64]:
    """Return the first of the 2¹⁶ slots of each code −reach … reach.

    Each code has one slot. Zero gets its share of the other slots. The rest of each side decreases
    by the ratio 1 − (decay / 256)² from one magnitude to the next.
    """
    reach, decay = int(table["reach"]), int(table["decay"]) ** 2
    spare = _TOTAL - (2 * reach + 1)
    side = (spare - (spare * int(table["zeros"]) >> 8)) // 2 if reach else 0
    rest, widths = side, []
    for magnitude in range(1, reach + 1):
        left = rest - (rest * decay >> _BITS) if magnitude < reach else 0
        widths.append(1 + rest - left)
        rest = left
    both = [*reversed(widths), 1 + spare - 2 * side, *widths]
    return (np.cumsum(both) - both).astype(np.uint64)


def _widths(model: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return np.diff(model, append=np.uint64(_TOTAL))


def _lookup(widths: NDArray[np.uint64]) -> NDArray[np.int16]:
    """Return the position of the code of each of the 2¹⁶ slots.

    A lookup takes a tenth of the time of a binary search, for any number of codes.
    """
    places = np.arange(len(widths), dtype=np.uint16)  # up to 2 * 16,383
    return np.repeat(places, widths.astype(np.int64)).view(np.int16)


def _state_words(states: NDArray[np.uint64]) -> Words:
    """Split states [lanes] into words, the lowest first."""
    return np.ascontiguousarray(states, "<u8").view("<u2").reshape(-1, 4)[:, :_STATE_WORDS].ravel()


def _read_states(words: Words) -> NDArray[np.uint64]:
    """Join words to states.

    Raises:
        MalformedFrame: a state is below the lowest one.
    """
    padded = np.zeros((len(words) // _STATE_WORDS, 4), "<u2")
    padded[:, :_STATE_WORDS] = words.reshape(-1, _STATE_WORDS)
    states = padded.view("<u8").ravel().astype(np.uint64)
    if (states < _LOWEST).any():
        raise _invalid_words("a lane's state is too small", int(_LOWEST), int(states.min()))
    return states


def _invalid_words(message: str, limit: int, value: int | None) -> MalformedFrame:
    return MalformedFrame(message, field="words", limit=limit, value=value)
