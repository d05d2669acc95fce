"""Quantisation to 4 bits, with one scale for each group of 64 in a row of the last dimension."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.arrays import Backend, Generator, chunks, widen
from protocol.codecs.codec import FixedSizeCodec
from protocol.codecs.memory import (
    BFLOAT16_BYTES,
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
    def _extremes(self, xp: Any, groups: Any, scratch: Any) -> list[Any]:
        """Return float32 [rows, groups, 1] for `_describe`, of groups [rows, groups, size]."""

    @abstractmethod
    def _describe(self, backend: Backend, extremes: Sequence[Any]) -> list[Any]:
        """Return the numbers of each group, the scale first, as bits of bfloat16."""

    @abstractmethod
    def _are_in_range(self, numbers: Sequence[NDArray[np.float32]]) -> bool:
        """Whether finite groups can have these numbers."""

    @abstractmethod
    def _to_codes(self, xp: Any, groups: Any, numbers: Sequence[Any], out: Any) -> Any:
        """Fill ``out`` with codes before rounding, and return it."""

    @abstractmethod
    def _from_codes(self, groups: Any, numbers: Sequence[Any]) -> None:
        """Turn the four bits of each code into its value, in place."""

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        xp = backend.xp
        source = to_matrix(backend, array)
        width = source.shape[1]
        chunk_rows = rows_per_chunk(width, backend)
        scratch = xp.empty_like(_group(xp, source[:chunk_rows]))
        extremes = [
            self._extremes(xp, _group(xp, chunk), scratch[: len(chunk)])
            for (chunk,) in chunks(chunk_rows, source)
        ]
        numbers = self._describe(
            backend, [xp.concat(column) for column in zip(*extremes, strict=True)]
        )
        divisors = [widen(number, backend) for number in numbers]
        divisors[0][divisors[0] == 0] = math.inf  # x / inf gives code 0
        packed = xp.empty_like(source[:, : _half(width)], dtype=xp.uint8)
        for chunk, out, *chunk_numbers in chunks(chunk_rows, source, packed, *divisors):
            codes = self._to_codes(xp, _group(xp, chunk), chunk_numbers, scratch[: len(chunk)])
            round_in_place(backend, codes, generator, *self.code_range)
            _pack(xp, _ungroup(codes, width), self.zero, out)
        sent = [backend.host(number) for number in numbers]
        if not self._are_in_range([widen(bits) for bits in sent]):
            raise range_error(self.name, MAX_MAGNITUDE, max_magnitude(backend, source))
        return [to_buffer(backend.host(packed)), *map(to_buffer, sent)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        rows, width = matrix_shape(shape)
        groups, _ = _count_groups(width)
        group_buffer = rows * groups * BFLOAT16_BYTES
        return [rows * _half(width)] + [group_buffer] * self.group_numbers

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        rows, width = matrix_shape(shape)
        groups, size = _count_groups(width)
        packed = from_buffer(buffers[0], "u1", rows, _half(width))
        if width % 2 and bool((packed[:, -1:] > 15).any()):
            raise MalformedFrame("unused bits must be zero", field="codes", limit=0)
        numbers = [widen(from_buffer(buffer, "<i2", rows, groups, 1)) for buffer in buffers[1:]]
        if not self._are_in_range(numbers):
            raise MalformedFrame(
                "a scale or a minimum is out of range",
                field="scales",
                limit=_MAX_SCALE,
                value=find_extremes(*numbers),
            )
        decoded = backend.empty(rows, width)
        chunk_rows = rows_per_chunk(width, backend)
        for out, chunk, *chunk_numbers in chunks(
            chunk_rows, decoded, backend.own(packed), *map(backend.own, numbers)
        ):
            _unpack(chunk, out)
            groups_of_chunk = _group(backend.xp, out)
            self._from_codes(groups_of_chunk, chunk_numbers)
            if width % size:  # the groups are a padded copy
                out[...] = _ungroup(groups_of_chunk, width)
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

    def _extremes(self, xp: Any, groups: Any, scratch: Any) -> list[Any]:
        return [xp.max(xp.abs(groups, out=scratch), axis=2, keepdims=True)]

    def _describe(self, backend: Backend, extremes: Sequence[Any]) -> list[Any]:
        return [_truncate(backend.xp, _flush_small(extremes[0] / 7))]

    def _are_in_range(self, numbers: Sequence[NDArray[np.float32]]) -> bool:
        return is_within(numbers[0], 0.0, _MAX_SCALE)

    def _to_codes(self, xp: Any, groups: Any, numbers: Sequence[Any], out: Any) -> Any:
        return xp.divide(groups, numbers[0], out=out)

    def _from_codes(self, groups: Any, numbers: Sequence[Any]) -> None:
        groups -= self.zero
        groups *= numbers[0]


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

    def _extremes(self, xp: Any, groups: Any, scratch: Any) -> list[Any]:
        return [extreme(groups, axis=2, keepdims=True) for extreme in (xp.min, xp.max)]

    def _describe(self, backend: Backend, extremes: Sequence[Any]) -> list[Any]:
        least, greatest = extremes
        minimum = _truncate(backend.xp, least, downwards=True)
        scale = _flush_small((greatest - widen(minimum, backend)) / 15)
        return [_truncate(backend.xp, scale, upwards=True), minimum]

    def _are_in_range(self, numbers: Sequence[NDArray[np.float32]]) -> bool:
        scale, minimum = numbers
        return is_within(scale, 0.0, _MAX_SCALE) and is_within(
            minimum, -MAX_MAGNITUDE, MAX_MAGNITUDE
        )

    def _to_codes(self, xp: Any, groups: Any, numbers: Sequence[Any], out: Any) -> Any:
        scale, minimum = numbers
        codes = xp.subtract(groups, minimum, out=out)
        codes /= scale
        return codes

    def _from_codes(self, groups: Any, numbers: Sequence[Any]) -> None:
        scale, minimum = numbers
        groups *= scale
        groups += minimum


def _count_groups(width: int) -> tuple[int, int]:
    """Return the number of groups in a row, and their size: the row's width if that is below 64."""
    return -(-width // _GROUP_SIZE), min(width, _GROUP_SIZE)


def _half(width: int) -> int:
    """Return the bytes of a row of codes."""
    return -(-width // 2)


def _group(xp: Any, rows: Any) -> Any:
    """Return rows [rows, D] as float32 groups [rows, groups, size], as a view if D fits.

    Otherwise it repeats the last element, which changes neither minimum nor maximum.
    """
    width = rows.shape[1]
    groups, size = _count_groups(width)
    missing = groups * size - width
    plain = xp.astype(rows, xp.float32, copy=False)
    if missing:
        plain = xp.concat([plain, *[plain[:, -1:]] * missing], axis=1)
    return plain.reshape(len(rows), groups, size)


def _ungroup(groups: Any, width: int) -> Any:
    """Return groups [rows, groups, size] as rows [rows, D], without what `_group` repeated."""
    rows, count, size = groups.shape
    return groups.reshape(rows, count * size)[:, :width]


def _flush_small(scale: Any) -> Any:
    """Set scales too small to be precise to zero, in place."""
    scale[scale < MIN_SCALE] = 0.0
    return scale


def _truncate(xp: Any, values: Any, *, downwards: bool = False, upwards: bool = False) -> Any:
    """Convert float32 to bits of bfloat16, rounding towards zero unless another direction is given.

    Args:
        values: any shape; not negative if ``upwards``.
        downwards: round towards −∞.
        upwards: round towards +∞.
    """
    bits = values.view(xp.int32)
    if downwards:  # increases the magnitude of a negative number
        bits = bits + ((bits >> 31) & 0xFFFF)
    if upwards:
        bits = bits + 0xFFFF
    return xp.astype(bits >> 16, xp.int16)


def _pack(xp: Any, codes: Any, zero: int, out: Any) -> None:
    """Pack integer-valued codes [rows, D] into uint8 ``out`` [rows, ⌈D / 2⌉]."""
    half = out.shape[1]
    numbers = xp.astype(codes, xp.int8).view(xp.uint8)  # to signed bytes: their conversion is fast
    numbers += zero
    out[...] = numbers[:, :half]
    out[:, : numbers.shape[1] - half] |= numbers[:, half:] << 4


def _unpack(packed: Any, out: Any) -> None:
    """Unpack uint8 [rows, ⌈D / 2⌉] into numbers 0 … 15, float32 ``out`` [rows, D]."""
    half = packed.shape[1]
    out[:, :half] = packed & 15
    out[:, half:] = packed[:, : out.shape[1] - half] >> 4
