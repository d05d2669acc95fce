"""Low-rank approximation: the singular vectors that carry most of a tensor's energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from protocol.arrays import Backend, Generator
from protocol.codecs.codec import Codec
from protocol.codecs.memory import (
    check_magnitude,
    find_extremes,
    from_buffer,
    is_within,
    to_buffer,
)
from protocol.errors import MalformedFrame
from protocol.wire import FLOAT32_BYTES

_FLOAT16_BYTES = 2

_LARGEST_SINGULAR_VALUE = 2.0**100  # keeps the product of the three factors finite


class Svd(Codec):
    """The fewest singular vectors with the share E of a tensor's energy.

    A tensor of two or more dimensions is a matrix [d0, rest]. It sends the r largest singular
    values, as few as have the share E of the sum of all squares: U [d0, r] and V [r, rest] as
    float16 (their elements are at most 1), the singular values [r] as float32. If that saves no
    bytes, or with fewer dimensions, it sends the tensor as plain float32.

    The norm of the error is at most √(1 − E) + 2⁻⁹ of the tensor's norm. It never rounds at random
    and ignores a generator. NaN, infinity and magnitudes above 2¹²⁵ are refused.

    Compression of float32: 4 d0 rest / (r (2 d0 + 2 rest + 4)), never below 1. The rank r depends
    on the values; features that differ from sample to sample have a high rank.

    Source: FedKD, arXiv 2108.13323.

    Args:
        energy: E, above 0 and at most 1.
        name: name with the parameter as written.
    """

    def __init__(self, energy: float, name: str) -> None:
        self.name, self._energy = name, energy

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        plain = backend.xp.astype(array, backend.xp.float32, copy=False)
        check_magnitude(self.name, backend, plain)
        max_rank, factors = _max_rank(array.shape), None
        if max_rank:
            factors = self._factorise(backend, plain.reshape(len(plain), -1), max_rank)
        return [to_buffer(backend.host(part)) for part in factors or [plain]]

    def _factorise(self, backend: Backend, matrix: Any, max_rank: int) -> list[Any] | None:
        """Return U, singular values and V as sent; None to send the matrix as plain float32."""
        xp = backend.xp
        try:
            left, values, right = xp.linalg.svd(matrix, full_matrices=False)
        except backend.linalg_error:  # no convergence
            return None
        energies = xp.cumulative_sum(xp.astype(values, xp.float64) ** 2)
        total = float(energies[-1])
        rank = int((energies < self._energy * total).sum()) + 1 if total else 0
        if rank > max_rank or not float(values[0]) <= _LARGEST_SINGULAR_VALUE:
            return None
        vectors = [backend.clip(part, -1, 1) for part in (left[:, :rank], right[:rank])]
        left, right = (xp.astype(part, xp.float16) for part in vectors)
        return [left, values[:rank], right]

    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        if count == 1:
            return [FLOAT32_BYTES * math.prod(shape)]
        max_rank = _max_rank(shape)
        if count != 3 or not max_rank:
            raise self._wrong_sizes(shape, [count])
        return _sizes(shape, max_rank)

    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        limits = self.max_sizes(shape, len(sizes))
        expected = limits if len(limits) == 1 else _sizes(shape, sizes[1] // FLOAT32_BYTES)
        if list(sizes) != expected or not 0 <= sizes[-1] <= limits[-1]:
            raise self._wrong_sizes(shape, list(sizes))

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        if len(buffers) == 1:
            return backend.own(from_buffer(buffers[0], "<f4", *shape))
        rank = buffers[1].nbytes // FLOAT32_BYTES
        left = from_buffer(buffers[0], "<f2", shape[0], rank)
        values = from_buffer(buffers[1], "<f4", rank)
        right = from_buffer(buffers[2], "<f2", rank, math.prod(shape[1:]))
        if not (is_within(left, -1, 1) and is_within(right, -1, 1)):
            raise MalformedFrame(
                "an element of a singular vector must be at most 1",
                field="vectors",
                limit=1,
                value=find_extremes(left, right),
            )
        if not is_within(values, 0, _LARGEST_SINGULAR_VALUE):
            raise MalformedFrame(
                "a singular value must be from 0 to this limit",
                field="values",
                limit=_LARGEST_SINGULAR_VALUE,
                value=find_extremes(values),
            )
        xp = backend.xp
        scaled = xp.astype(backend.own(left), xp.float32) * backend.own(values)
        return (scaled @ xp.astype(backend.own(right), xp.float32)).reshape(tuple(shape))

    def _wrong_sizes(self, shape: Sequence[int], sizes: list[int]) -> MalformedFrame:
        return MalformedFrame(
            f"a {self.name} tensor of shape {list(shape)} needs one float32 buffer, or three "
            "buffers of one rank with fewer bytes in all",
            field="sizes",
            limit=FLOAT32_BYTES * math.prod(shape),
            value=sizes,
        )


def _sizes(shape: Sequence[int], rank: int) -> list[int]:
    return [
        _FLOAT16_BYTES * rank * shape[0],
        FLOAT32_BYTES * rank,
        _FLOAT16_BYTES * rank * math.prod(shape[1:]),
    ]


def _max_rank(shape: Sequence[int]) -> int:
    """Return the largest rank with fewer bytes than the plain tensor; 0 if there is none."""
    elements = math.prod(shape)
    if len(shape) < 2 or elements == 0:
        return 0
    rest = elements // shape[0]
    bytes_per_rank = _FLOAT16_BYTES * (shape[0] + rest) + FLOAT32_BYTES
    return min(shape[0], rest, (FLOAT32_BYTES * elements - 1) // bytes_per_rank)
