"""Codecs that send the bytes of a tensor in one dtype, unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device, FixedSizeCodec
from protocol.codecs.memory import from_buffer, max_magnitude, to_buffer, to_device
from protocol.errors import InvalidField
from protocol.wire import FLOAT32_BYTES


class RawCodec(FixedSizeCodec):
    """The bytes of the tensor in one dtype: row-major, little-endian."""

    dtype: torch.dtype
    row_wise = True

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        return [to_buffer(tensor.detach().to(self.dtype))]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        return [math.prod(shape) * self.dtype.itemsize]

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the bytes of a conversion to float32 or of a copy; the tensor itself is a view."""
        return math.prod(shape) * max(FLOAT32_BYTES, self.dtype.itemsize)

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        return to_device(from_buffer(buffers[0], self.dtype, *shape), device)


class Float32(RawCodec):
    """Single precision, exact."""

    name, dtype = "float32", torch.float32


class Float16(RawCodec):
    """Half precision. A value beyond its range is refused, never sent as infinity.

    Error of an element x: at most 2⁻¹¹ |x|, or 2⁻²⁵ where |x| is below 2⁻¹⁴.
    """

    name, dtype = "float16", torch.float16

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        half = tensor.detach().to(torch.float16)
        if not math.isfinite(max_magnitude(half)):  # fast; NaN values may pass
            _refuse_infinity(half.isinf(), tensor.detach())
        return super().encode(half, generator)


class BFloat16(RawCodec):
    """The upper 16 bits of a float32: its full range, with 8 bits of precision.

    Error of an element x: at most 2⁻⁸ |x|, where |x| is at least 2⁻¹²⁶.
    """

    name, dtype = "bfloat16", torch.bfloat16


class Int64(RawCodec):
    """64-bit integers, exact."""

    name, dtype, floating = "int64", torch.int64, False


class UInt8(RawCodec):
    """Bytes, exact; sample ids, for example."""

    name, dtype, floating = "uint8", torch.uint8, False


def _refuse_infinity(infinite: Tensor, tensor: Tensor) -> None:
    if bool(infinite.any()):
        raise InvalidField(
            "a value is too large for float16",
            field="codec",
            limit=torch.finfo(torch.float16).max,
            value=float(tensor[infinite].abs().max()),
            hint="use bfloat16 or float32 for this kind of tensor",
        )
