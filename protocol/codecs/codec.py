"""What every codec can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

Buffer = bytes | bytearray | memoryview
Device = torch.device | str


class Codec(ABC):
    """Turns a tensor into buffers and back.

    A codec has no state and takes no part in the choice of shapes. What a frame declares is
    checked with `check_sizes` before a byte of it is decoded.

    Attributes:
        name: on the wire and in a run's settings.
        floating: carries floating-point numbers; else whole ones.
        row_wise: every buffer is a run of equal parts, one for each index of the first dimension,
            and a part depends on nothing outside its row. What was encoded together can then be
            taken apart, kept and joined anew without decoding.
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
