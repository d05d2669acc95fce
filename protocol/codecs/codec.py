"""The interface of every codec."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from protocol.arrays import NUMPY, Array, Backend, Device, Generator, backend_of, backend_on
from protocol.errors import MalformedFrame
from protocol.wire import FLOAT32_BYTES

if TYPE_CHECKING:
    from torch import Tensor

Buffer = bytes | bytearray | memoryview


class Codec(ABC):
    """Encodes an array as buffers, and decodes it. A codec has no state.

    It computes with the library of the array (see `protocol.arrays`).

    A receiver calls `check_sizes` with the declared sizes before it decodes. It also checks the
    shape, since a few bytes can decode to a large tensor.

    Attributes:
        name: name in frames and in a run's settings.
        floating: whether it encodes floating-point numbers, not integers.
        row_wise: whether, for two or more dimensions, each buffer consists of equal parts, one for
            each index of the first dimension, which depend on that row only. Rows can then be
            split, stored and joined without decoding.
    """

    name: str
    floating: bool = True
    row_wise: bool = False

    def encode(self, array: Array, generator: Generator | None = None) -> list[memoryview]:
        """Encode an array. Its own memory becomes the buffer if possible.

        Args:
            array: NumPy array, or torch tensor on any device, of any shape.
            generator: generator of random rounding, with which the expected value of the decoded
                array is the array; None: round to nearest.

        Raises:
            InvalidField: this codec cannot encode the array.
        """
        backend = backend_of(array)
        with np.errstate(all="ignore"):  # numbers beyond the range are refused
            return self._encode(backend, backend.own(array), generator)

    @abstractmethod
    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        """Encode an array of this backend."""

    @abstractmethod
    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        """Return the maximum bytes of each of ``count`` buffers of a tensor.

        Raises:
            MalformedFrame: a tensor of this shape never has this many buffers.
        """

    @abstractmethod
    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        """Refuse buffer sizes that are impossible for a tensor of this shape.

        Raises:
            MalformedFrame: the number of buffers or a size is wrong.
        """

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the maximum bytes that decoding needs, including temporary memory.

        They are known from the header, so that memory is reserved before it is allocated.

        Args:
            shape: shape of the tensor.
            sizes: bytes of each buffer, which `check_sizes` has accepted.
        """
        return FLOAT32_BYTES * math.prod(shape) + 2 * sum(sizes)

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        """Decode a torch tensor of ``shape`` on ``device``. It may share the buffers' memory.

        The encoded buffers are moved to the device and decoded there.

        Raises:
            MalformedFrame: this codec never writes such buffers.
        """
        with np.errstate(all="ignore"):
            tensor: Tensor = self._decode(backend_on(device), buffers, shape)
        return tensor

    def decode_array(self, buffers: Sequence[memoryview], shape: Sequence[int]) -> NDArray[Any]:
        """Decode a NumPy array of ``shape``. It may share the buffers' memory, and be read-only.

        Raises:
            MalformedFrame: this codec never writes such buffers.
        """
        with np.errstate(all="ignore"):
            array: NDArray[Any] = self._decode(NUMPY, buffers, shape)
        return array

    def decode_like(self, array: Any, buffers: Sequence[memoryview]) -> Any:
        """Decode buffers of an array of this shape: of the same library, on the same device."""
        backend = backend_of(array)
        with np.errstate(all="ignore"):
            return self._decode(backend, buffers, array.shape)

    @abstractmethod
    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        """Decode an array of this backend."""


class FixedSizeCodec(Codec):
    """A codec whose buffer sizes depend on the shape alone."""

    @abstractmethod
    def sizes(self, shape: Sequence[int]) -> list[int]:
        """Return the bytes of each buffer of a tensor of this shape."""

    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        expected = self.sizes(shape)
        if count != len(expected):
            raise self._wrong_sizes(shape, expected, [count])
        return expected

    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        expected = self.sizes(shape)
        if list(sizes) != expected:
            raise self._wrong_sizes(shape, expected, list(sizes))

    def _wrong_sizes(
        self, shape: Sequence[int], expected: list[int], value: list[int]
    ) -> MalformedFrame:
        return MalformedFrame(
            f"a {self.name} tensor of shape {list(shape)} needs buffers of {expected} bytes",
            field="sizes",
            limit=expected,
            value=value,
        )
