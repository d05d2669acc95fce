"""Sparsification: the largest elements of a tensor and their indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.arrays import Backend, Generator, widen
from protocol.codecs.codec import FixedSizeCodec
from protocol.codecs.memory import (
    MAX_MAGNITUDE,
    check_magnitude,
    find_extremes,
    from_buffer,
    is_within,
    to_buffer,
)
from protocol.errors import InvalidField, MalformedFrame

_MAX_ELEMENTS = 2**31  # an index is a positive int32

_MAX_REPORTED = 16  # indices in an error message

_INDEX_BYTES, _VALUE_BYTES = 4, 2


class TopK(FixedSizeCodec):
    """The share F of the elements with the largest magnitudes, of the whole tensor.

    Of n elements it sends k = ⌈F n⌉, of equal magnitudes the first, as bfloat16 (gradients lie
    below the range of float16) with a relative error of at most 2⁻⁸. All others decode to zero. The
    squared error is at most (1 − k / n + 2⁻¹⁶) of the squared norm, and much smaller if few
    elements carry most of the norm.

    Use it with `ErrorFeedback`, which adds the elements that were not sent to the next tensor. It
    never rounds at random and ignores a generator. NaN, infinity and magnitudes above 2¹²⁵ are
    refused.

    Compression of float32: 4 / (6 F), for an index of four bytes and a value of two.

    Args:
        share: F, above 0 and at most 1.
        name: name with the parameter as written.
    """

    def __init__(self, share: Fraction, name: str) -> None:
        self.name, self._share = name, share

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        elements = math.prod(array.shape)
        if elements > _MAX_ELEMENTS:
            raise InvalidField(
                "the tensor has too many elements for a 32-bit index",
                field="codec",
                limit=_MAX_ELEMENTS,
                value=elements,
            )
        xp = backend.xp
        plain = xp.astype(array.reshape(-1), xp.float32, copy=False)
        check_magnitude(self.name, backend, plain)
        indices = _indices_of_largest(backend, xp.abs(plain), self._count(array.shape))
        parts = [xp.astype(indices, xp.int32), backend.to_bfloat16(plain[indices])]
        return [to_buffer(backend.host(part)) for part in parts]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        count = self._count(shape)
        return [_INDEX_BYTES * count, _VALUE_BYTES * count]

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        elements, count = math.prod(shape), self._count(shape)
        indices = from_buffer(buffers[0], "<i4", count)
        values = widen(from_buffer(buffers[1], "<i2", count))
        if count and not _is_increasing_below(indices, elements):
            raise MalformedFrame(
                "indices must increase strictly, from 0 to below the number of elements",
                field="indices",
                limit=elements - 1,
                value=indices[:_MAX_REPORTED].tolist(),
            )
        if not is_within(values, -2 * MAX_MAGNITUDE, 2 * MAX_MAGNITUDE):
            raise MalformedFrame(
                "a value is beyond this magnitude, or NaN",
                field="values",
                limit=2 * MAX_MAGNITUDE,
                value=find_extremes(values),
            )
        decoded = backend.empty(elements)
        decoded[...] = 0.0
        decoded[backend.xp.astype(backend.own(indices), backend.xp.int64)] = backend.own(values)
        return decoded.reshape(tuple(shape))

    def _count(self, shape: Sequence[int]) -> int:
        return math.ceil(self._share * math.prod(shape))


def _indices_of_largest(backend: Backend, magnitudes: Any, count: int) -> Any:
    """Return the indices of the ``count`` largest, ascending; of equal ones the first."""
    xp = backend.xp
    if count == 0:
        return xp.empty_like(magnitudes[:0], dtype=xp.int64)
    least = backend.kth_largest(magnitudes, count)
    (above,), (equal,) = xp.nonzero(magnitudes > least), xp.nonzero(magnitudes == least)
    return xp.sort(xp.concat([above, equal[: count - len(above)]]))


def _is_increasing_below(indices: NDArray[np.int32], end: int) -> bool:
    """Whether indices (not empty) increase strictly within 0 … end − 1.

    It compares neighbours, because a difference could overflow.
    """
    is_inside = int(indices[0]) >= 0 and int(indices[-1]) < end
    return is_inside and bool((indices[1:] > indices[:-1]).all())
