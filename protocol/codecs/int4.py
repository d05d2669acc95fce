"""Half a byte a number, with a scale for each group of 64 in a row of the last dimension."""

from __future__ import annotations

import math
from abc import abstractmethod
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

GROUP = 64

_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: below it precision is lost

_LARGEST_SCALE = 2.0**123  # 15 times this, and a minimum, is finite, whatever the other end sends

_LARGEST_MINIMUM = 2.0**125


class _FourBits(FixedSizeCodec):
    """What both forms share: rows, groups, and two codes in a byte.

    Buffers: the codes, then one bfloat16 number for every group, for each of `numbers`. (bfloat16
    and not float16: gradients lie below the range of float16, and a scale needs no more precision,
    since codes are chosen for the scale as it is sent.)

    A row of D codes takes H = ⌈D / 2⌉ bytes: byte j holds code j in its low half and code H + j
    in its high half, so that each half of a row is read and written in one piece.
    """

    row_wise = True
    numbers: int  # that describe a group
    codes: tuple[int, int]  # the least and the greatest
    zero: int  # what stands in a byte for the code 0

    @abstractmethod
    def _extremes(self, groups: Tensor, scratch: Tensor) -> list[Tensor]:
        """What `_describe` needs of groups [rows, groups, size]: float32 [rows, groups, 1] each."""

    @abstractmethod
    def _describe(self, extremes: Sequence[Tensor]) -> list[Tensor]:
        """The numbers of each group: bfloat16, the scale first."""

    @abstractmethod
    def _sound(self, numbers: Sequence[Tensor]) -> bool:
        """Whether these (on the CPU) are what groups of finite numbers give."""

    @abstractmethod
    def _to_codes(self, groups: Tensor, numbers: Sequence[Tensor], out: Tensor) -> Tensor:
        """``out``, filled with codes that are not yet rounded."""

    @abstractmethod
    def _from_codes(self, groups: Tensor, numbers: Sequence[Tensor]) -> None:
        """Turn what stands in the bytes into numbers again, in place."""

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        source = to_matrix(tensor)
        width = source.shape[1]
        at_once = rows_per_chunk(width, source.device)
        parts = source.split(at_once)
        scratch = torch.empty_like(_grouped(source[:at_once]))
        found = [self._extremes(part, scratch[: len(part)]) for part in map(_grouped, parts)]
        numbers = self._describe([torch.cat(same) for same in zip(*found, strict=True)])
        wide = [number.to(torch.float32) for number in numbers]
        wide[0].masked_fill_(wide[0] == 0, math.inf)  # what it divides becomes zero
        packed = torch.empty(len(source), _half(width), dtype=torch.int8, device=source.device)
        for part, out, *few in zip(parts, *_split(at_once, packed, *wide), strict=True):
            codes = self._to_codes(_grouped(part), few, scratch[: len(part)])
            round_in_place(codes, generator, *self.codes)
            _pack(codes.flatten(1)[:, :width], self.zero, out)
        numbers = [number.cpu() for number in numbers]
        if not self._sound(numbers):
            raise range_error(self.name, _LARGEST_MINIMUM, max_magnitude(source))
        return [to_buffer(packed), *map(to_buffer, numbers)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        rows, width = matrix_shape(shape)
        groups, _ = _groups(width)
        return [rows * _half(width)] + [rows * groups * 2] * self.numbers

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        rows, width = matrix_shape(shape)
        groups, size = _groups(width)
        packed = from_buffer(buffers[0], torch.uint8, rows, _half(width))
        if width % 2 and bool((packed[:, -1:] > 15).any()):
            raise MalformedFrame("the unused half of a byte is zero", field="codes", limit=0)
        few = [from_buffer(buffer, torch.bfloat16, rows, groups, 1) for buffer in buffers[1:]]
        if not self._sound(few):
            raise MalformedFrame(
                "a number of a group is out of range",
                field="scales",
                limit=_LARGEST_SCALE,
                value=find_extremes(*few),
            )
        packed = to_device(packed, device)
        numbers = [to_device(number, device).to(torch.float32) for number in few]
        decoded = torch.empty(rows, width, dtype=torch.float32, device=device)
        at_once = rows_per_chunk(width, decoded.device)
        for codes, part, *own in zip(*_split(at_once, decoded, packed, *numbers), strict=True):
            _unpack(part, codes)
            wide = _grouped(codes)
            self._from_codes(wide, own)
            if width % size:
                codes.copy_(wide.flatten(1)[:, :width])
        return decoded.reshape(tuple(shape))


class Int4(_FourBits):
    """Symmetric quantisation to −7 … 7, a bfloat16 scale for each group of 64.

    A group is 64 neighbours in a row of the last dimension; the last one of a row may be shorter.
    Where its largest magnitude is a, the scale s is a / 7 cut to bfloat16 (towards zero) and x
    becomes round(x / s). Every element comes back within s / 2 ≤ a / 14 (s, with stochastic
    rounding); a group of magnitudes below 7 · 2⁻¹²⁶ comes back as zeros. NaN, infinity and
    magnitudes of 2¹²⁶ and more are refused; what is decoded is finite.

    Ratio to float32: 4 D / (⌈D / 2⌉ + 2 ⌈D / 64⌉), for rows of D elements (7.53 for D = 384). A
    tensor of one dimension is a single row.
    """

    name, numbers, codes, zero = "int4", 1, (-7, 7), 8

    def _extremes(self, groups: Tensor, scratch: Tensor) -> list[Tensor]:
        return [torch.amax(torch.abs(groups, out=scratch), 2, keepdim=True)]

    def _describe(self, extremes: Sequence[Tensor]) -> list[Tensor]:
        return [_cut(_normal(extremes[0] / 7))]

    def _sound(self, numbers: Sequence[Tensor]) -> bool:
        return is_within(numbers[0], 0.0, _LARGEST_SCALE)

    def _to_codes(self, groups: Tensor, numbers: Sequence[Tensor], out: Tensor) -> Tensor:
        return torch.div(groups, numbers[0], out=out)

    def _from_codes(self, groups: Tensor, numbers: Sequence[Tensor]) -> None:
        groups.sub_(self.zero).mul_(numbers[0])


class Int4Asymmetric(_FourBits):
    """Quantisation to 0 … 15 above a minimum: a bfloat16 scale and minimum for each group of 64.

    For what is not centred on zero. The minimum m is the least element of the group, cut to
    bfloat16 downwards; the scale s is (greatest − m) / 15, cut to bfloat16 upwards; x becomes
    round((x − m) / s). Every element comes back within s / 2 (s, with stochastic rounding), which
    is at most (1 + 2⁻⁷) / 30 of the group's range plus 2⁻⁷ times its least element's magnitude;
    float32's own rounding is added. A group whose range lies below 15 · 2⁻¹²⁶ comes back as its
    minimum. NaN, infinity, a minimum below −2¹²⁵ or above 2¹²⁵ and a range above 15 · 2¹²³ are
    refused; what is decoded is finite.

    Ratio to float32: 4 D / (⌈D / 2⌉ + 4 ⌈D / 64⌉), for rows of D elements (7.11 for D = 384). A
    tensor of one dimension is a single row.
    """

    name, numbers, codes, zero = "int4-asym", 2, (0, 15), 0

    def _extremes(self, groups: Tensor, scratch: Tensor) -> list[Tensor]:
        return [torch.amin(groups, 2, keepdim=True), torch.amax(groups, 2, keepdim=True)]

    def _describe(self, extremes: Sequence[Tensor]) -> list[Tensor]:
        least, greatest = extremes
        minimum = _cut(least, downwards=True)
        return [_cut(_normal((greatest - minimum.to(torch.float32)) / 15), upwards=True), minimum]

    def _sound(self, numbers: Sequence[Tensor]) -> bool:
        scale, minimum = numbers
        return is_within(scale, 0.0, _LARGEST_SCALE) and is_within(
            minimum, -_LARGEST_MINIMUM, _LARGEST_MINIMUM
        )

    def _to_codes(self, groups: Tensor, numbers: Sequence[Tensor], out: Tensor) -> Tensor:
        scale, minimum = numbers
        return torch.sub(groups, minimum, out=out).div_(scale)

    def _from_codes(self, groups: Tensor, numbers: Sequence[Tensor]) -> None:
        scale, minimum = numbers
        groups.mul_(scale).add_(minimum)


def _groups(width: int) -> tuple[int, int]:
    """How many groups a row has, and their size. A narrow row is one group of its own width."""
    return -(-width // GROUP), min(width, GROUP)


def _half(width: int) -> int:
    return -(-width // 2)


def _grouped(rows: Tensor) -> Tensor:
    """Rows [rows, D] as float32 groups [rows, groups, size], without a copy where they fit.

    Where they do not, the last element is repeated: it moves neither minimum nor maximum.
    """
    width = rows.shape[1]
    groups, size = _groups(width)
    missing = groups * size - width
    plain = rows.to(torch.float32)
    if missing:
        plain = torch.cat([plain, plain[:, -1:].expand(-1, missing)], 1)
    return plain.view(-1, groups, size)


def _split(at_once: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(at_once) for tensor in tensors]


def _normal(scale: Tensor) -> Tensor:
    """In place, scales too small to be precise become zero."""
    return scale.masked_fill_(scale < _SMALLEST_SCALE, 0.0)


def _cut(values: Tensor, *, downwards: bool = False, upwards: bool = False) -> Tensor:
    """float32 as the upper half of its bits: towards zero, or towards −∞, or away from zero.

    Args:
        values: any shape; where ``upwards``, none below zero.
        downwards: towards −∞.
        upwards: towards +∞.
    """
    bits = values.view(torch.int32)
    if downwards:  # a negative number's magnitude grows
        bits = bits + (bits >> 31).bitwise_and_(0xFFFF)
    if upwards:
        bits = bits + 0xFFFF
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _pack(codes: Tensor, zero: int, out: Tensor) -> None:
    """Whole numbers [rows, D], which are overwritten, into int8 ``out`` [rows, ⌈D / 2⌉]."""
    half = out.shape[1]
    low, high = codes[:, :half], codes[:, half:]
    low[:, : high.shape[1]].add_(high, alpha=16)
    # float32 converts fast to signed bytes alone: leave out the highest bit, then turn it over.
    out.copy_(low.add_(17 * zero - 128)).bitwise_xor_(-128)
    if high.shape[1] < half:
        out[:, -1].bitwise_and_(15)  # there is no second code


def _unpack(packed: Tensor, out: Tensor) -> None:
    """uint8 [rows, ⌈D / 2⌉] into numbers 0 … 15, float32 ``out`` [rows, D]."""
    half = packed.shape[1]
    out[:, :half].copy_(packed.bitwise_and(15))
    out[:, half:].copy_(packed[:, : out.shape[1] - half].bitwise_right_shift(4))
