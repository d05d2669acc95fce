"""A tensor as a matrix of low rank: the singular values that carry most of its energy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Codec, Device
from protocol.codecs.memory import (
    find_extremes,
    from_buffer,
    is_within,
    max_magnitude,
    range_error,
    to_buffer,
    to_device,
)
from protocol.errors import MalformedFrame

_LARGEST = 2.0**125

_LARGEST_SINGULAR_VALUE = 2.0**100  # the product of what is sent is finite


class Svd(Codec):
    """The singular vectors of a tensor that hold the share E of its energy (FedKD, 2108.13323).

    A tensor of two dimensions or more is a matrix [d0, rest]. Of its singular values, the largest
    first, as few are kept as have E of the sum of all squares. U [d0, r] and V [r, rest] are sent
    as float16 (their elements are at most 1), the singular values [r] as float32. Where that takes
    no fewer bytes, and for tensors of fewer dimensions, the tensor is sent as plain float32.

    The norm of the error is at most √(1 − E) + 2⁻⁹ of the tensor's. Rounding at random is not on
    offer: a generator is left unused. NaN, infinity and magnitudes above 2¹²⁵ are refused.

    Ratio to float32: 4 d0 rest / (r (2 d0 + 2 rest + 4)), and never below 1. The rank r depends on
    what the tensor holds; features that differ from sample to sample have a high one.

    Args:
        energy: E, above 0 and at most 1.
        name: with the parameter as it was written.
    """

    def __init__(self, energy: float, name: str) -> None:
        self.name, self._energy = name, energy

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        plain = tensor.detach().to(torch.float32)
        largest = max_magnitude(plain)
        if not largest <= _LARGEST:  # NaN too
            raise range_error(self.name, _LARGEST, largest)
        most = _largest_rank(tensor.shape)
        factors = self._factors(plain.reshape(len(plain), -1), most) if most else None
        return [to_buffer(part) for part in factors or [plain]]

    def _factors(self, matrix: Tensor, most: int) -> list[Tensor] | None:
        """U, singular values and V as they are sent; None where the matrix is to go as it is."""
        try:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # did not converge
            return None
        energies = values.to(torch.float64).square().cumsum(0)
        total = float(energies[-1])
        rank = int((energies < self._energy * total).sum()) + 1 if total else 0
        if rank > most or not float(values[0]) <= _LARGEST_SINGULAR_VALUE:
            return None
        left, right = left[:, :rank].clamp(-1, 1), right[:rank].clamp(-1, 1)
        return [left.to(torch.float16), values[:rank], right.to(torch.float16)]

    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        if count == 1:
            return [4 * math.prod(shape)]
        most = _largest_rank(shape)
        if count != 3 or not most:
            raise self._wrong_sizes(shape, [count])
        return _sizes(shape, most)

    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        limits = self.max_sizes(shape, len(sizes))
        expected = limits if len(limits) == 1 else _sizes(shape, sizes[1] // 4)
        if list(sizes) != expected or not 0 <= sizes[-1] <= limits[-1]:
            raise self._wrong_sizes(shape, list(sizes))

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        if len(buffers) == 1:
            return to_device(from_buffer(buffers[0], torch.float32, *shape), device)
        rank = buffers[1].nbytes // 4
        left = from_buffer(buffers[0], torch.float16, shape[0], rank)
        values = from_buffer(buffers[1], torch.float32, rank)
        right = from_buffer(buffers[2], torch.float16, rank, math.prod(shape[1:]))
        if not (is_within(left, -1, 1) and is_within(right, -1, 1)):
            raise MalformedFrame(
                "an element of a singular vector is at most 1",
                field="vectors",
                limit=1,
                value=find_extremes(left, right),
            )
        if not is_within(values, 0, _LARGEST_SINGULAR_VALUE):
            raise MalformedFrame(
                "a singular value is out of range",
                field="values",
                limit=_LARGEST_SINGULAR_VALUE,
                value=find_extremes(values),
            )
        scaled = to_device(left, device).to(torch.float32) * to_device(values, device)
        return (scaled @ to_device(right, device).to(torch.float32)).reshape(tuple(shape))

    def _wrong_sizes(self, shape: Sequence[int], sizes: list[int]) -> MalformedFrame:
        return MalformedFrame(
            f"a {self.name} tensor of shape {list(shape)} takes one buffer of its own size, or "
            "three of one rank that are smaller together",
            field="sizes",
            limit=4 * math.prod(shape),
            value=sizes,
        )


def _sizes(shape: Sequence[int], rank: int) -> list[int]:
    return [2 * rank * shape[0], 4 * rank, 2 * rank * math.prod(shape[1:])]


def _largest_rank(shape: Sequence[int]) -> int:
    """The largest rank that takes fewer bytes than the plain tensor; 0: none does."""
    elements = math.prod(shape)
    if len(shape) < 2 or elements == 0:
        return 0
    rest = elements // shape[0]
    return min(shape[0], rest, (4 * elements - 1) // (2 * shape[0] + 2 * rest + 4))
