"""The interface of every codec."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.errors import MalformedFrame
from protocol.wire import FLOAT32_BYTES

Buffer = bytes | bytearray | memoryview

Device = torch.device | str


class Codec(ABC):
    """Encodes a tensor as buffers and decodes it; without state.

    A receiver calls `check_sizes` with a frame's declarations before it decodes a byte. A few bytes
    can stand for a large tensor: a receiver checks shapes from the other end before it decodes.

    Attributes:
        name: on the wire and in a run's settings.
        floating: encodes floating-point numbers; else integers.
        row_wise: every buffer of a tensor of two or more dimensions is a run of equal parts, one
            for each index of the first dimension, and a part depends on that row alone. Rows can
            then be split, stored and joined again without decoding.
    """

    name: str
    floating: bool = True
    row_wise: bool = False

    @abstractmethod
    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        """Encode a tensor; its own memory becomes the buffer where possible.

        Args:
            tensor: any shape, any device; the codec computes on that device.
            generator: source of random rounding, for a codec that rounds: the expected value of
                the decoded tensor is then the tensor. None: round to nearest.

        Raises:
            InvalidField: this codec cannot encode the tensor.
        """

    @abstractmethod
    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        """Return the most bytes that each of ``count`` buffers of a tensor may have.

        Raises:
            MalformedFrame: a tensor of this shape never has this many buffers.
        """

    @abstractmethod
    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        """Refuse buffer sizes that do not fit a tensor of this shape.

        Raises:
            MalformedFrame: wrong number of buffers, or a wrong size.
        """

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the most bytes that decoding takes: the tensor, and what it needs meanwhile.

        Known from a header alone, so that memory is counted before it is taken.

        Args:
            shape: of the tensor.
            sizes: of its buffers, which `check_sizes` has accepted.
        """
        return FLOAT32_BYTES * math.prod(shape) + 2 * sum(sizes)

    @abstractmethod
    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        """Decode a tensor of ``shape`` on ``device``. It may share the buffers' memory.

        The buffers move to the device as they are and are decoded there.

        Raises:
            MalformedFrame: this codec never writes such buffers.
        """


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
