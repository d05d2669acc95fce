"""The largest elements of a tensor and where they stand; the others become zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import (
    find_extremes,
    from_buffer,
    is_within,
    max_magnitude,
    range_error,
    to_buffer,
    to_device,
)
from protocol.errors import InvalidField, MalformedFrame

_LARGEST = 2.0**125

_MOST_ELEMENTS = 2**31  # an index is a positive int32

_SHOWN = 16  # wrong indices in a refusal


class TopK(FixedSizeCodec):
    """The share F of the elements with the largest magnitudes, of the whole tensor.

    Of n elements k = ⌈F n⌉ are kept; of equal ones those that stand first. Values are sent as
    bfloat16 (gradients lie below the range of float16), each within 2⁻⁸ of itself; the others
    come back as zero. So the squared error is at most (1 − k / n + 2⁻¹⁶) of the squared norm,
    and far less where few elements carry most of it.

    It is meant to be used with `ErrorFeedback`, which sends later what was left out. Rounding at
    random is not on offer: a generator is left unused. NaN, infinity and magnitudes above 2¹²⁵ are
    refused.

    Ratio to float32: 4 / (6 F), for four bytes of index and two of value (13.3 for F = 0.05).

    Args:
        share: F, above 0 and at most 1.
        name: with the parameter as it was written.
    """

    def __init__(self, share: Fraction, name: str) -> None:
        self.name, self._share = name, share

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        if tensor.numel() > _MOST_ELEMENTS:
            raise InvalidField(
                "a tensor has too many elements for an index of 32 bits",
                field="codec",
                limit=_MOST_ELEMENTS,
                value=tensor.numel(),
            )
        plain = tensor.detach().reshape(-1).to(torch.float32)
        largest = max_magnitude(plain)
        if not largest <= _LARGEST:  # NaN too
            raise range_error(self.name, _LARGEST, largest)
        places = _places_of_largest(plain.abs(), self._count(tensor.shape))
        return [to_buffer(places.to(torch.int32)), to_buffer(plain[places].to(torch.bfloat16))]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        count = self._count(shape)
        return [4 * count, 2 * count]

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        elements, count = math.prod(shape), self._count(shape)
        places = from_buffer(buffers[0], torch.int32, count)
        values = from_buffer(buffers[1], torch.bfloat16, count)
        if count and not _rises_within(places, elements):
            raise MalformedFrame(
                "indices rise, each within the tensor",
                field="indices",
                limit=elements - 1,
                value=places[:_SHOWN].tolist(),
            )
        if not is_within(values, -2 * _LARGEST, 2 * _LARGEST):
            raise MalformedFrame(
                "a value is out of range",
                field="values",
                limit=2 * _LARGEST,
                value=find_extremes(values),
            )
        decoded = torch.zeros(elements, dtype=torch.float32, device=device)
        decoded[to_device(places, device).to(torch.int64)] = to_device(values, device).to(
            torch.float32
        )
        return decoded.reshape(tuple(shape))

    def _count(self, shape: Sequence[int]) -> int:
        return math.ceil(self._share * math.prod(shape))


def _places_of_largest(magnitudes: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest stand, rising; of equal ones the first."""
    if count == 0:
        return magnitudes.new_empty(0, dtype=torch.int64)
    least = torch.topk(magnitudes, count, sorted=False).values.min()
    above = (magnitudes > least).nonzero().flatten()
    equal = (magnitudes == least).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, equal]).sort().values


def _rises_within(places: Tensor, end: int) -> bool:
    """Whether places (int32, on the CPU, at least one) rise strictly from 0 or more to below end.

    Neighbours are compared, not subtracted: a difference could overflow.
    """
    inside = int(places[0]) >= 0 and int(places[-1]) < end
    return inside and bool((places[1:] > places[:-1]).all())
