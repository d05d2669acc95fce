"""What every codec can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.errors import MalformedFrame

Buffer = bytes | bytearray | memoryview

Device = torch.device | str


class Codec(ABC):
    """Turns a tensor into buffers and back.

    A codec has no state and takes no part in the choice of shapes. What a frame declares is
    checked with `check_sizes` before a byte of it is decoded. A few bytes may stand for a large
    tensor: where shapes come from the other end, a receiver checks them before it decodes.

    Attributes:
        name: on the wire and in a run's settings.
        floating: carries floating-point numbers; else whole ones.
        row_wise: of a tensor of two dimensions or more, every buffer is a run of equal parts, one
            for each index of the first dimension, and a part depends on nothing outside its row.
            What was encoded together can then be taken apart, kept and joined anew without
            decoding.
    """

    name: str
    floating: bool = True
    row_wise: bool = False

    @abstractmethod
    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        """The buffers that stand for ``tensor``, without a copy where its memory will do.

        Args:
            tensor: of any shape, on any device; what is computed is computed there.
            generator: where given and the codec rounds, it rounds at random by this generator, so
                that the expected value of the decoded tensor is the tensor.

        Raises:
            InvalidField: the tensor cannot be sent with this codec.
        """

    @abstractmethod
    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        """The most bytes that each of ``count`` buffers of a tensor of this shape may have.

        Raises:
            MalformedFrame: such a tensor never has this many buffers.
        """

    @abstractmethod
    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        """Refuse sizes that cannot belong to a tensor of this shape.

        Raises:
            MalformedFrame: the count or a size of the buffers is not what the shape needs.
        """

    @abstractmethod
    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        """The tensor again, of ``shape``, on ``device``. It may share the buffers' memory.

        The buffers cross to the device as they are and are decoded there.

        Raises:
            MalformedFrame: the buffers do not hold what this codec writes.
        """


class FixedSizeCodec(Codec):
    """A codec whose buffers' sizes follow from the shape alone."""

    @abstractmethod
    def sizes(self, shape: Sequence[int]) -> list[int]:
        """The bytes of each buffer of a tensor of this shape."""

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
            f"a {self.name} tensor of shape {list(shape)} takes buffers of {expected} bytes",
            field="sizes",
            limit=expected,
            value=value,
        )
