"""Quantisation to 8 bits, with one scale for each row of the last dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from protocol.arrays import Backend, Generator, chunks
from protocol.codecs.codec import FixedSizeCodec
from protocol.codecs.memory import (
    MIN_SCALE,
    find_extremes,
    from_buffer,
    is_within,
    matrix_shape,
    max_magnitude,
    range_error,
    round_in_place,
    rows_per_chunk,
    to_buffer,
    to_matrix,
)
from protocol.errors import MalformedFrame
from protocol.wire import FLOAT32_BYTES

_MAX_SCALE = 2.0**119  # 128 times this is finite, so all decoded values are

_LEVELS = 127


class Int8(FixedSizeCodec):
    """Symmetric quantisation to −127 … 127, a float32 scale for each row of the last dimension.

    The scale of a row with largest magnitude a is s = a / 127; x becomes round(x / s). The error of
    an element is at most s / 2 (s with stochastic rounding), plus float32's own rounding error. A
    row of magnitudes below 127 · 2⁻¹²⁶ decodes to zeros. NaN, infinity and magnitudes above
    127 · 2¹¹⁹ are refused; all decoded values are finite.

    Compression of float32: 4 D / (D + 4), for rows of D elements. A tensor of one dimension is a
    single row.
    """

    name, row_wise = "int8", True

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        xp = backend.xp
        source = to_matrix(backend, array)
        # Two read-only passes are faster than one pass that writes magnitudes.
        highest, lowest = (extreme(source, axis=1, keepdims=True) for extreme in (xp.max, xp.min))
        scales = xp.astype(xp.maximum(highest, -lowest), xp.float32)
        scales /= _LEVELS
        scales[scales < MIN_SCALE] = 0.0
        divisors = xp.asarray(scales, copy=True)
        divisors[divisors == 0] = math.inf  # x / inf gives code 0
        values = xp.empty_like(source, dtype=xp.int8)
        chunk_rows = rows_per_chunk(source.shape[1], backend)
        scratch = backend.empty(*source[:chunk_rows].shape)
        for part, divisor, out in chunks(chunk_rows, source, divisors, values):
            plain = xp.astype(part, xp.float32, copy=False)
            codes = xp.divide(plain, divisor, out=scratch[: len(part)])
            out[...] = round_in_place(backend, codes, generator, -_LEVELS, _LEVELS)
        sent = backend.host(scales)
        if not is_within(sent, 0.0, _MAX_SCALE):
            raise range_error(self.name, _LEVELS * _MAX_SCALE, max_magnitude(backend, source))
        return [to_buffer(backend.host(values)), to_buffer(sent)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        rows, width = matrix_shape(shape)
        return [rows * width, rows * FLOAT32_BYTES]

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        rows, width = matrix_shape(shape)
        scales = from_buffer(buffers[1], "<f4", rows, 1)
        if not is_within(scales, 0.0, _MAX_SCALE):
            raise MalformedFrame(
                "a scale must be a finite number of at least 0",
                field="scales",
                limit=_MAX_SCALE,
                value=find_extremes(scales),
            )
        values = backend.own(from_buffer(buffers[0], "i1", rows, width))
        decoded = backend.empty(rows, width)
        chunk_rows = rows_per_chunk(width, backend)
        for out, codes, scale in chunks(chunk_rows, decoded, values, backend.own(scales)):
            out[...] = codes
            out *= scale
        return decoded.reshape(tuple(shape))
