"""One byte a number, with one scale for each row of the last dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import (
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

SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: below it precision is lost

LARGEST_SCALE = 2.0**119  # 128 times this is finite, whatever the other end sends

_LEVELS = 127


class Int8(FixedSizeCodec):
    """Symmetric quantisation to −127 … 127, a float32 scale for each row of the last dimension.

    Of a row whose largest magnitude is a, the scale is s = a / 127 and x becomes round(x / s).
    Every element of the row comes back within s / 2 (s, with stochastic rounding), apart from
    float32's own rounding; a row of magnitudes below 127 · 2⁻¹²⁶ comes back as zeros. NaN,
    infinity and magnitudes above 127 · 2¹¹⁹ are refused; what is decoded is finite.

    Ratio to float32: 4 D / (D + 4), for rows of D elements (3.96 for D = 384). A tensor of one
    dimension is a single row.
    """

    name, row_wise = "int8", True

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        source = to_matrix(tensor)
        # Two passes that only read are faster than one that writes magnitudes down.
        highest, lowest = source.amax(1, keepdim=True), source.amin(1, keepdim=True)
        scales = torch.maximum(highest, -lowest).to(torch.float32).div_(_LEVELS)
        scales.masked_fill_(scales < SMALLEST_SCALE, 0.0)
        divisors = scales.masked_fill(scales == 0, math.inf)  # what it divides becomes zero
        values = torch.empty(source.shape, dtype=torch.int8, device=source.device)
        at_once = rows_per_chunk(source.shape[1], source.device)
        scratch = torch.empty_like(source[:at_once], dtype=torch.float32)
        for part, divisor, out in zip(
            *(every.split(at_once) for every in (source, divisors, values)), strict=True
        ):
            codes = torch.div(part.to(torch.float32), divisor, out=scratch[: len(part)])
            out.copy_(round_in_place(codes, generator, -_LEVELS, _LEVELS))
        scales = scales.cpu()
        if not is_within(scales, 0.0, LARGEST_SCALE):
            raise range_error(self.name, _LEVELS * LARGEST_SCALE, max_magnitude(source))
        return [to_buffer(values), to_buffer(scales)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        rows, width = matrix_shape(shape)
        return [rows * width, rows * 4]

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        rows, width = matrix_shape(shape)
        scales = from_buffer(buffers[1], torch.float32, rows, 1)
        if not is_within(scales, 0.0, LARGEST_SCALE):
            raise MalformedFrame(
                "a scale is a finite number of at least 0",
                field="scales",
                limit=LARGEST_SCALE,
                value=find_extremes(scales),
            )
        values = to_device(from_buffer(buffers[0], torch.int8, rows, width), device)
        scales = to_device(scales, device)
        decoded = torch.empty(rows, width, dtype=torch.float32, device=device)
        at_once = rows_per_chunk(width, decoded.device)
        for out, codes, scale in zip(
            decoded.split(at_once), values.split(at_once), scales.split(at_once), strict=True
        ):
            out.copy_(codes).mul_(scale)
        return decoded.reshape(tuple(shape))
