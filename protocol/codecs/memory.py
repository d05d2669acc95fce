"""Conversion between arrays and buffers, and the arithmetic that the codecs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from protocol.arrays import Backend, Generator
from protocol.errors import FieldValue, InvalidField
from protocol.wire import FLOAT32_BYTES

MAX_MAGNITUDE = 2.0**125  # largest magnitude, for codecs that compute with the whole array

MIN_SCALE = 2.0**-126  # the smallest normal float32: smaller scales lose precision

BFLOAT16_BYTES = 2


def to_buffer(array: NDArray[Any]) -> memoryview:
    """Return an array's memory, row-major; copied only if not contiguous."""
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")


def from_buffer(buffer: memoryview, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
    """Return an array in the memory of a buffer that has exactly its size."""
    if buffer.nbytes == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(buffer, dtype).reshape(shape)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and width of a shape seen as a matrix; the width is the last dimension.

    A scalar is one row of one element; an array without elements has no row.
    """
    elements, width = math.prod(shape), shape[-1] if shape else 1
    return (elements // width, width) if elements else (0, 1)


def to_matrix(backend: Backend, array: Any) -> Any:
    """Return an array as contiguous [rows, width] (see `matrix_shape`), if possible as a view."""
    return backend.contiguous(array.reshape(matrix_shape(array.shape)))


def rows_per_chunk(width: int, backend: Backend) -> int:
    """Return how many float32 rows of this width to process at once."""
    return max(1, backend.chunk_bytes // (FLOAT32_BYTES * max(width, 1)))


def round_in_place(
    backend: Backend, values: Any, generator: Generator | None, low: int, high: int
) -> Any:
    """Round to nearest, ties to even, or with a generator at random and without bias.

    Random rounding takes one of the two neighbours, the upper one with a probability equal to the
    distance from the lower one. It clips to ``low`` … ``high``, because a float32 rounding error
    can carry a value beyond.
    """
    if generator is None:
        return backend.xp.round(values, out=values)
    values += backend.draw(values.shape, generator)
    return backend.clip(backend.floor(values), low, high)


def max_magnitude(backend: Backend, array: Any) -> float:
    """Return the largest absolute value: NaN if any element is NaN, 0 for an empty array."""
    return backend.magnitude(array) if math.prod(array.shape) else 0.0


def check_magnitude(codec: str, backend: Backend, array: Any) -> float:
    """Return the largest absolute value, at most `MAX_MAGNITUDE`.

    Raises:
        InvalidField: an element is NaN, infinite or too large.
    """
    magnitude = max_magnitude(backend, array)
    if not magnitude <= MAX_MAGNITUDE:  # also refuses NaN
        raise range_error(codec, MAX_MAGNITUDE, magnitude)
    return magnitude


def power_of_two_above(magnitude: float) -> float:
    """Return a power of two just above: division by it is exact, and no square overflows."""
    return 2.0 ** max(math.frexp(magnitude)[1], -100)


def is_within(values: NDArray[Any], low: float, high: float) -> bool:
    """Whether all values lie in a range. NaN lies in no range."""
    return values.size == 0 or bool(values.min() >= low and values.max() <= high)


def find_extremes(*arrays: NDArray[Any]) -> list[FieldValue]:
    """Return the least and the greatest number of each array, for an error's ``value``."""
    return [float(extreme) for values in arrays for extreme in (values.min(), values.max())]


def range_error(codec: str, limit: float, magnitude: float) -> InvalidField:
    """Build the error for NaN, infinity, or numbers too large for a codec."""
    return InvalidField(
        f"{codec} encodes only finite numbers up to this magnitude",
        field="codec",
        limit=limit,
        value=magnitude,
        hint="send this tensor with float32, or find out why it is not finite",
    )
