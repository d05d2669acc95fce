"""Codecs that send the bytes of a tensor in one dtype, unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.arrays import Backend, Generator
from protocol.codecs.codec import FixedSizeCodec
from protocol.codecs.memory import BFLOAT16_BYTES, from_buffer, max_magnitude, to_buffer
from protocol.errors import InvalidField
from protocol.wire import FLOAT32_BYTES

_FLOAT16_END = 65_520.0  # the least magnitude that float16 rounds to infinity


class RawCodec(FixedSizeCodec):
    """The bytes of the array in one dtype: row-major, little-endian. Its name is the dtype's."""

    item_bytes: int
    row_wise = True

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        dtype = getattr(backend.xp, self.name)
        return [to_buffer(backend.host(backend.xp.astype(array, dtype, copy=False)))]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        return [math.prod(shape) * self.item_bytes]

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the bytes of a conversion to float32 or of a copy; the array itself is a view."""
        return math.prod(shape) * max(FLOAT32_BYTES, self.item_bytes)

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        dtype = np.dtype(self.name).newbyteorder("<")
        return backend.own(from_buffer(buffers[0], dtype, *shape))


class Float32(RawCodec):
    """Single precision, exact."""

    name, item_bytes = "float32", 4


class Float16(RawCodec):
    """Half precision. A value beyond its range is refused, never sent as infinity.

    Error of an element x: at most 2⁻¹¹ |x|, or 2⁻²⁵ where |x| is below 2⁻¹⁴.
    """

    name, item_bytes = "float16", 2

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        xp = backend.xp
        # Both libraries round a float64 twice, first to float32.
        plain = array if array.dtype == xp.float16 else xp.astype(array, xp.float32, copy=False)
        if not max_magnitude(backend, plain) < _FLOAT16_END:  # fast; also NaN, which may pass
            _refuse_infinity(backend, plain)
        return super()._encode(backend, plain, generator)


class BFloat16(RawCodec):
    """The upper 16 bits of a float32: its full range, with 8 bits of precision.

    Error of an element x: at most 2⁻⁸ |x|, where |x| is at least 2⁻¹²⁶. Decoded by NumPy, the
    array is float32.
    """

    name, item_bytes = "bfloat16", BFLOAT16_BYTES

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        plain = backend.xp.astype(array, backend.xp.float32, copy=False)
        return [to_buffer(backend.host(backend.to_bfloat16(plain)))]

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        return backend.from_bfloat16(from_buffer(buffers[0], "<i2", *shape))


class Int64(RawCodec):
    """64-bit integers, exact."""

    name, item_bytes, floating = "int64", 8, False


class UInt8(RawCodec):
    """Bytes, exact; sample ids, for example."""

    name, item_bytes, floating = "uint8", 1, False


def _refuse_infinity(backend: Backend, values: Any) -> None:
    magnitudes = backend.host(backend.xp.abs(values))
    too_large: NDArray[np.bool_] = magnitudes >= _FLOAT16_END
    if too_large.any():
        raise InvalidField(
            "a value is too large for float16",
            field="codec",
            limit=float(np.finfo(np.float16).max),
            value=float(magnitudes[too_large].max()),
            hint="use bfloat16 or float32 for this kind of tensor",
        )
