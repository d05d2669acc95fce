"""Quantisation to 4 bits, with one scale for each group of 64 in a row of the last dimension."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import (
    MAX_MAGNITUDE,
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

_GROUP_SIZE = 64

_MAX_SCALE = 2.0**123  # 15 times this plus a minimum is finite, so all decoded values are


class _FourBits(FixedSizeCodec):
    """Base of both 4-bit codecs: rows, groups, and two codes in a byte.

    Buffers: the codes, then `group_numbers` buffers with one bfloat16 number for each group.
    (bfloat16, because gradients lie below the range of float16; its precision is enough, because
    the codes are computed with the scale as sent.)

    A row of D codes has H = ⌈D / 2⌉ bytes: byte j holds code j in its low half and code H + j in
    its high half, so that each half of a row is read and written as one block.
    """

    row_wise = True
    group_numbers: int  # scale, or scale and minimum
    code_range: tuple[int, int]  # least and greatest code
    zero: int  # the four bits of code 0

    @abstractmethod
    def _extremes(self, groups: Tensor, scratch: Tensor) -> list[Tensor]:
        """Return float32 [rows, groups, 1] for `_describe`, of groups [rows, groups, size]."""

    @abstractmethod
    def _describe(self, extremes: Sequence[Tensor]) -> list[Tensor]:
        """Return the bfloat16 numbers of each group, the scale first."""

    @abstractmethod
    def _are_in_range(self, numbers: Sequence[Tensor]) -> bool:
        """Whether finite groups can have these numbers (on the CPU)."""

    @abstractmethod
    def _to_codes(self, groups: Tensor, numbers: Sequence[Tensor], out: Tensor) -> Tensor:
        """Fill ``out`` with codes before rounding, and return it."""

    @abstractmethod
    def _from_codes(self, groups: Tensor, numbers: Sequence[Tensor]) -> None:
        """Turn the four bits of each code into its value, in place."""

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        source = to_matrix(tensor)
        width = source.shape[1]
        chunk_rows = rows_per_chunk(width, source.device)
        chunks = source.split(chunk_rows)
        scratch = torch.empty_like(_group(source[:chunk_rows]))
        extremes = [self._extremes(chunk, scratch[: len(chunk)]) for chunk in map(_group, chunks)]
        numbers = self._describe([torch.cat(column) for column in zip(*extremes, strict=True)])
        divisors = [number.to(torch.float32) for number in numbers]
        divisors[0].masked_fill_(divisors[0] == 0, math.inf)  # x / inf gives code 0
        packed = torch.empty(len(source), _half(width), dtype=torch.int8, device=source.device)
        for chunk, out, *chunk_numbers in zip(
            chunks, *_split(chunk_rows, packed, *divisors), strict=True
        ):
            codes = self._to_codes(_group(chunk), chunk_numbers, scratch[: len(chunk)])
            round_in_place(codes, generator, *self.code_range)
            _pack(codes.flatten(1)[:, :width], self.zero, out)
        numbers = [number.cpu() for number in numbers]
        if not self._are_in_range(numbers):
            raise range_error(self.name, MAX_MAGNITUDE, max_magnitude(source))
        return [to_buffer(packed), *map(to_buffer, numbers)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        rows, width = matrix_shape(shape)
        groups, _ = _count_groups(width)
        group_buffer = rows * groups * torch.bfloat16.itemsize
        return [rows * _half(width)] + [group_buffer] * self.group_numbers

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        rows, width = matrix_shape(shape)
        groups, size = _count_groups(width)
        packed = from_buffer(buffers[0], torch.uint8, rows, _half(width))
        if width % 2 and bool((packed[:, -1:] > 15).any()):
            raise MalformedFrame("unused bits must be zero", field="codes", limit=0)
        narrow = [from_buffer(buffer, torch.bfloat16, rows, groups, 1) for buffer in buffers[1:]]
        if not self._are_in_range(narrow):
            raise MalformedFrame(
                "a scale or a minimum is out of range",
                field="scales",
                limit=_MAX_SCALE,
                value=find_extremes(*narrow),
            )
        packed = to_device(packed, device)
        numbers = [to_device(number, device).to(torch.float32) for number in narrow]
        decoded = torch.empty(rows, width, dtype=torch.float32, device=device)
        chunk_rows = rows_per_chunk(width, decoded.device)
        for out, chunk, *chunk_numbers in zip(
            *_split(chunk_rows, decoded, packed, *numbers), strict=True
        ):
            _unpack(chunk, out)
            groups_of_chunk = _group(out)
            self._from_codes(groups_of_chunk, chunk_numbers)
            if width % size:  # the groups are a padded copy
                out.copy_(groups_of_chunk.flatten(1)[:, :width])
        return decoded.reshape(tuple(shape))


class Int4(_FourBits):
    """Symmetric quantisation to −7 … 7, a bfloat16 scale for each group of 64.

    A group is 64 neighbours in a row of the last dimension; a row's last group may be shorter. The
    scale s of a group with largest magnitude a is a / 7, truncated to bfloat16; x becomes
    round(x / s). The error of an element is at most s / 2 ≤ a / 14 (s with stochastic rounding). A
    group of magnitudes below 7 · 2⁻¹²⁶ decodes to zeros. NaN, infinity and magnitudes of 2¹²⁶ or
    more are refused; all decoded values are finite.

    Compression of float32: 4 D / (⌈D / 2⌉ + 2 ⌈D / 64⌉), for rows of D elements. A tensor of one
    dimension is a single row.
    """

    name, group_numbers, code_range, zero = "int4", 1, (-7, 7), 8

    def _extremes(self, groups: Tensor, scratch: Tensor) -> list[Tensor]:
        return [torch.amax(torch.abs(groups, out=scratch), 2, keepdim=True)]

    def _describe(self, extremes: Sequence[Tensor]) -> list[Tensor]:
        return [_truncate(_flush_small(extremes[0] / 7))]

    def _are_in_range(self, numbers: Sequence[Tensor]) -> bool:
        return is_within(numbers[0], 0.0, _MAX_SCALE)

    def _to_codes(self, groups: Tensor, numbers: Sequence[Tensor], out: Tensor) -> Tensor:
        return torch.div(groups, numbers[0], out=out)

    def _from_codes(self, groups: Tensor, numbers: Sequence[Tensor]) -> None:
        groups.sub_(self.zero).mul_(numbers[0])


class Int4Asymmetric(_FourBits):
    """Quantisation to 0 … 15 above a minimum: a bfloat16 scale and minimum for each group of 64.

    For numbers not centred on zero. The minimum m is the group's least element, rounded down to
    bfloat16; the scale s is (greatest − m) / 15, rounded up to bfloat16; x becomes
    round((x − m) / s). The error of an element is at most s / 2 (s with stochastic rounding), which
    is at most (1 + 2⁻⁷) / 30 of the group's range plus 2⁻⁷ times its least element's magnitude,
    plus float32's own rounding error. A group with a range below 15 · 2⁻¹²⁶ decodes to its minimum.
    NaN, infinity, a minimum below −2¹²⁵ or above 2¹²⁵ and a range above 15 · 2¹²³ are refused; all
    decoded values are finite.

    Compression of float32: 4 D / (⌈D / 2⌉ + 4 ⌈D / 64⌉), for rows of D elements. A tensor of one
    dimension is a single row.
    """

    name, group_numbers, code_range, zero = "int4-asym", 2, (0, 15), 0

    def _extremes(self, groups: Tensor, scratch: Tensor) -> list[Tensor]:
        return [torch.amin(groups, 2, keepdim=True), torch.amax(groups, 2, keepdim=True)]

    def _describe(self, extremes: Sequence[Tensor]) -> list[Tensor]:
        least, greatest = extremes
        minimum = _truncate(least, downwards=True)
        scale = _flush_small((greatest - minimum.to(torch.float32)) / 15)
        return [_truncate(scale, upwards=True), minimum]

    def _are_in_range(self, numbers: Sequence[Tensor]) -> bool:
        scale, minimum = numbers
        return is_within(scale, 0.0, _MAX_SCALE) and is_within(
            minimum, -MAX_MAGNITUDE, MAX_MAGNITUDE
        )

    def _to_codes(self, groups: Tensor, numbers: Sequence[Tensor], out: Tensor) -> Tensor:
        scale, minimum = numbers
        return torch.sub(groups, minimum, out=out).div_(scale)

    def _from_codes(self, groups: Tensor, numbers: Sequence[Tensor]) -> None:
        scale, minimum = numbers
        groups.mul_(scale).add_(minimum)


def _count_groups(width: int) -> tuple[int, int]:
    """Return the number of groups in a row, and their size: the row's width if that is below 64."""
    return -(-width // _GROUP_SIZE), min(width, _GROUP_SIZE)


def _half(width: int) -> int:
    """Return the bytes of a row of codes."""
    return -(-width // 2)


def _group(rows: Tensor) -> Tensor:
    """Return rows [rows, D] as float32 groups [rows, groups, size], as a view if D fits.

    Otherwise it repeats the last element, which changes neither minimum nor maximum.
    """
    width = rows.shape[1]
    groups, size = _count_groups(width)
    missing = groups * size - width
    plain = rows.to(torch.float32)
    if missing:
        plain = torch.cat([plain, plain[:, -1:].expand(-1, missing)], 1)
    return plain.view(-1, groups, size)


def _split(chunk_rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(chunk_rows) for tensor in tensors]


def _flush_small(scale: Tensor) -> Tensor:
    """Set scales too small to be precise to zero, in place."""
    return scale.masked_fill_(scale < MIN_SCALE, 0.0)


def _truncate(values: Tensor, *, downwards: bool = False, upwards: bool = False) -> Tensor:
    """Convert float32 to bfloat16, rounding towards zero unless another direction is given.

    Args:
        values: any shape; not negative if ``upwards``.
        downwards: round towards −∞.
        upwards: round towards +∞.
    """
    bits = values.view(torch.int32)
    if downwards:  # increases the magnitude of a negative number
        bits = bits + (bits >> 31).bitwise_and_(0xFFFF)
    if upwards:
        bits = bits + 0xFFFF
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _pack(codes: Tensor, zero: int, out: Tensor) -> None:
    """Pack integer-valued codes [rows, D] into int8 ``out`` [rows, ⌈D / 2⌉]; overwrites codes."""
    half = out.shape[1]
    low, high = codes[:, :half], codes[:, half:]
    low[:, : high.shape[1]].add_(high, alpha=16)
    # float32 converts fast only to signed bytes: subtract 128, then flip the highest bit.
    out.copy_(low.add_(17 * zero - 128)).bitwise_xor_(-128)
    if high.shape[1] < half:
        out[:, -1].bitwise_and_(15)  # no second code


def _unpack(packed: Tensor, out: Tensor) -> None:
    """Unpack uint8 [rows, ⌈D / 2⌉] into numbers 0 … 15, float32 ``out`` [rows, D]."""
    half = packed.shape[1]
    out[:, :half].copy_(packed.bitwise_and(15))
    out[:, half:].copy_(packed[:, : out.shape[1] - half].bitwise_right_shift(4))
