"""How a tensor becomes bytes: one registry of codecs, by the names they have on the wire."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from protocol.errors import InvalidField, MalformedFrame, UnknownCodec

__all__ = [
    "CODECS",
    "FLOAT_CODECS",
    "BFloat16",
    "Buffer",
    "Codec",
    "Float16",
    "Float32",
    "Int64",
    "RawCodec",
    "codec_named",
]

Buffer = bytes | bytearray | memoryview


class Codec(ABC):
    """Turns a tensor into buffers and back.

    A codec has no state and takes no part in the choice of shapes. What a frame declares is
    checked with `check_sizes` before a byte of it is decoded.
    """

    name: ClassVar[str]

    @abstractmethod
    def encode(self, tensor: Tensor) -> list[memoryview]:
        """The buffers that stand for ``tensor``, without a copy where its memory will do."""

    @abstractmethod
    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        """Refuse sizes that cannot belong to a tensor of this shape.

        Raises:
            MalformedFrame: the count or a size of the buffers is not what the shape needs.
        """

    @abstractmethod
    def decode(self, buffers: Sequence[memoryview], shape: Sequence[int]) -> Tensor:
        """The tensor again, of ``shape``. It may share the buffers' memory."""


class RawCodec(Codec):
    """The tensor's own bytes: row-major, little-endian, one dtype."""

    dtype: ClassVar[torch.dtype]

    def encode(self, tensor: Tensor) -> list[memoryview]:
        plain = tensor.detach().to(device="cpu", dtype=self.dtype).contiguous()
        if plain.numel() == 0:
            return [memoryview(b"")]
        return [memoryview(plain.reshape(-1).view(torch.uint8).numpy().data)]

    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        expected = math.prod(shape) * self.dtype.itemsize
        if list(sizes) != [expected]:
            raise MalformedFrame(
                f"a {self.name} tensor of shape {list(shape)} takes one buffer of {expected} bytes",
                field="sizes",
                limit=[expected],
                value=list(sizes),
            )

    def decode(self, buffers: Sequence[memoryview], shape: Sequence[int]) -> Tensor:
        if buffers[0].nbytes == 0:
            return torch.empty(tuple(shape), dtype=self.dtype)
        # torch wants memory it may write to; a read-only buffer is copied once.
        memory = bytearray(buffers[0]) if buffers[0].readonly else buffers[0]
        return torch.frombuffer(memory, dtype=self.dtype).reshape(tuple(shape))


class Float32(RawCodec):
    """Single precision, exact."""

    name, dtype = "float32", torch.float32


class Float16(RawCodec):
    """Half precision. What does not fit its range is refused, never sent as infinity."""

    name, dtype = "float16", torch.float16

    def encode(self, tensor: Tensor) -> list[memoryview]:
        half = tensor.detach().to(device="cpu", dtype=torch.float16)
        infinite = half.isinf()
        if bool(infinite.any()):
            raise InvalidField(
                "a value is too large for float16",
                field="codec",
                limit=torch.finfo(torch.float16).max,
                value=float(tensor.detach().cpu()[infinite].abs().max()),
                hint="use bfloat16 or float32 for this kind of tensor",
            )
        return super().encode(half)


class BFloat16(RawCodec):
    """The upper half of a float32: its whole range, with 8 bits of precision."""

    name, dtype = "bfloat16", torch.bfloat16


class Int64(RawCodec):
    """Whole numbers, exact."""

    name, dtype = "int64", torch.int64


CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Float32(), Float16(), BFloat16(), Int64())
}
FLOAT_CODECS = ("float32", "float16", "bfloat16")


def codec_named(name: str) -> Codec:
    """The codec of this name.

    Raises:
        UnknownCodec: there is none.
    """
    codec = CODECS.get(name)
    if codec is None:
        raise UnknownCodec(
            "this end does not have that codec", field="codec", limit=sorted(CODECS), value=name
        )
    return codec
