"""Any codec's buffers, compressed once more without loss (Zstandard, RFC 8878)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from protocol.codecs.codec import Codec, Device
from protocol.errors import MalformedFrame, UnknownCodec

_LEVEL = 1

_PLAIN, _FRAME = 0, 1  # the last byte of a buffer: what stands before it


class Compressed(Codec):
    """The buffers of another codec, each as a Zstandard frame where that is smaller.

    The last byte of every buffer says whether a frame stands before it (1) or the plain bytes (0);
    it is the last one so that plain bytes stay aligned. Error and limits are those of the other
    codec. The ratio depends on what the tensor holds; the cost is at most one byte a buffer.

    What a frame would become is read from its header and checked against what the other codec
    expects of the shape, before memory is taken for it.

    Args:
        inner: the other codec.
        name: this one's.

    Raises:
        UnknownCodec: the library is not installed here.
    """

    def __init__(self, inner: Codec, name: str) -> None:
        self.name, self.floating, self.inner = name, inner.floating, inner
        self._library = _library(name)

    def encode(self, tensor: Tensor, generator: torch.Generator | None = None) -> list[memoryview]:
        compressor = self._library.ZstdCompressor(level=_LEVEL)
        return [
            _smaller(plain, compressor.compress(plain))
            for plain in self.inner.encode(tensor, generator)
        ]

    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        return [size + 1 for size in self.inner.max_sizes(shape, count)]

    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        limits = self.max_sizes(shape, len(sizes))
        if any(not 1 <= size <= most for size, most in zip(sizes, limits, strict=True)):
            raise MalformedFrame(
                f"a {self.name} tensor of shape {list(shape)} takes smaller buffers, none empty",
                field="sizes",
                limit=limits,
                value=list(sizes),
            )

    def decode(
        self, buffers: Sequence[memoryview], shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        return self.inner.decode(self.decompress(buffers, shape), shape, device)

    def decompress(self, buffers: Sequence[memoryview], shape: Sequence[int]) -> list[memoryview]:
        """The buffers as the other codec wrote them, of a size that fits the shape.

        Raises:
            MalformedFrame: they are not what this codec writes for that shape.
        """
        sizes = [self._plain_size(buffer) for buffer in buffers]
        self.inner.check_sizes(shape, sizes)
        return [self._plain(buffer, size) for buffer, size in zip(buffers, sizes, strict=True)]

    def _plain_size(self, buffer: memoryview) -> int:
        """The bytes that a buffer says it stands for."""
        if buffer[-1] == _PLAIN:
            return buffer.nbytes - 1
        if buffer[-1] != _FRAME:
            raise MalformedFrame(
                "a buffer ends with 0 (plain) or 1 (compressed)",
                field="flag",
                limit=[_PLAIN, _FRAME],
                value=buffer[-1],
            )
        try:
            size = int(self._library.frame_content_size(buffer[:-1]))  # -1: it does not say
        except self._library.ZstdError as error:
            raise _broken(error) from error
        if size < buffer.nbytes:
            raise MalformedFrame(
                "a frame says its size, and is smaller than what it stands for",
                field="compressed",
                limit=buffer.nbytes,
                value=size,
            )
        return size

    def _plain(self, buffer: memoryview, size: int) -> memoryview:
        if buffer[-1] == _PLAIN:
            return buffer[:-1]
        try:
            plain: bytes = self._library.ZstdDecompressor().decompress(
                buffer[:-1], max_output_size=size, allow_extra_data=False
            )
        except self._library.ZstdError as error:
            raise _broken(error) from error
        if len(plain) != size:
            raise MalformedFrame(
                "a compressed buffer is not as long as it says",
                field="compressed",
                limit=size,
                value=len(plain),
            )
        return memoryview(plain)


def _smaller(plain: memoryview, frame: bytes) -> memoryview:
    if len(frame) < plain.nbytes:
        return memoryview(frame + bytes([_FRAME]))
    return memoryview(bytes(plain) + bytes([_PLAIN]))


def _broken(error: Exception) -> MalformedFrame:
    return MalformedFrame(
        "a buffer is not one Zstandard frame", field="compressed", value=str(error)
    )


def _library(name: str) -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise UnknownCodec(
            "a library that this codec needs is not installed here",
            field="codec",
            limit="zstandard",
            value=name,
            hint="pip install zstandard, or take the codec without +zstd",
        ) from error
    return zstandard
