"""Quantisation to 8 bits, with one scale for each row of the last dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device, FixedSizeCodec
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
    to_device,
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

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        source = to_matrix(tensor)
        # Two read-only passes are faster than one pass that writes magnitudes.
        highest, lowest = source.amax(1, keepdim=True), source.amin(1, keepdim=True)
        scales = torch.maximum(highest, -lowest).to(torch.float32).div_(_LEVELS)
        scales.masked_fill_(scales < MIN_SCALE, 0.0)
        divisors = scales.masked_fill(scales == 0, math.inf)  # x / inf gives code 0
        values = torch.empty(source.shape, dtype=torch.int8, device=source.device)
        chunk_rows = rows_per_chunk(source.shape[1], source.device)
        scratch = torch.empty_like(source[:chunk_rows], dtype=torch.float32)
        for part, divisor, out in zip(
            *(tensor.split(chunk_rows) for tensor in (source, divisors, values)), strict=True
        ):
            codes = torch.div(part.to(torch.float32), divisor, out=scratch[: len(part)])
            out.copy_(round_in_place(codes, generator, -_LEVELS, _LEVELS))
        scales = scales.cpu()
        if not is_within(scales, 0.0, _MAX_SCALE):
            raise range_error(self.name, _LEVELS * _MAX_SCALE, max_magnitude(source))
        return [to_buffer(values), to_buffer(scales)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        rows, width = matrix_shape(shape)
        return [rows * width, rows * FLOAT32_BYTES]

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        rows, width = matrix_shape(shape)
        scales = from_buffer(buffers[1], torch.float32, rows, 1)
        if not is_within(scales, 0.0, _MAX_SCALE):
            raise MalformedFrame(
                "a scale must be a finite number of at least 0",
                field="scales",
                limit=_MAX_SCALE,
                value=find_extremes(scales),
            )
        values = to_device(from_buffer(buffers[0], torch.int8, rows, width), device)
        scales = to_device(scales, device)
        decoded = torch.empty(rows, width, dtype=torch.float32, device=device)
        chunk_rows = rows_per_chunk(width, decoded.device)
        for out, codes, scale in zip(
            decoded.split(chunk_rows),
            values.split(chunk_rows),
            scales.split(chunk_rows),
            strict=True,
        ):
            out.copy_(codes).mul_(scale)
        return decoded.reshape(tuple(shape))
