"""Lossless compression of another codec's buffers (Zstandard, RFC 8878)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from protocol.arrays import Backend, Generator
from protocol.codecs.codec import Codec
from protocol.errors import MalformedFrame, UnknownCodec

_LEVEL = 1

_PLAIN, _FRAME = 0, 1  # last byte of a buffer: plain bytes, or a Zstandard frame


class Compressed(Codec):
    """The buffers of an inner codec, each as a Zstandard frame if that is smaller.

    The last byte of each buffer is 1 after a Zstandard frame and 0 after plain bytes. It is the
    last one so that plain bytes stay aligned. Error and limits are those of the inner codec. The
    compression depends on the values; a buffer grows by at most one byte.

    The decompressed size in a frame's header is checked against the sizes that the inner codec
    expects, before memory is allocated for it.

    Args:
        inner: the inner codec.
        name: name of this codec.

    Raises:
        UnknownCodec: the zstandard library is not installed.
    """

    def __init__(self, inner: Codec, name: str) -> None:
        self.name, self.floating, self.inner = name, inner.floating, inner
        self._library = _import_zstandard(name)

    def _encode(
        self, backend: Backend, array: Any, generator: Generator | None
    ) -> list[memoryview]:
        compressor = self._library.ZstdCompressor(level=_LEVEL)
        return [
            _choose_smaller(plain, compressor.compress(plain))
            for plain in self.inner._encode(backend, array, generator)
        ]

    def max_sizes(self, shape: Sequence[int], count: int) -> list[int]:
        return [size + 1 for size in self.inner.max_sizes(shape, count)]

    def check_sizes(self, shape: Sequence[int], sizes: Sequence[int]) -> None:
        limits = self.max_sizes(shape, len(sizes))
        if any(not 1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
            raise MalformedFrame(
                f"a {self.name} tensor of shape {list(shape)} needs buffers of 1 byte or "
                "more, up to these limits",
                field="sizes",
                limit=limits,
                value=list(sizes),
            )

    def decoded_bytes(self, shape: Sequence[int], sizes: Sequence[int]) -> int:
        """Return the most bytes of the inner codec's buffers, and of decoding them."""
        plain = self.inner.max_sizes(shape, len(sizes))
        return sum(plain) + self.inner.decoded_bytes(shape, plain)

    def _decode(self, backend: Backend, buffers: Sequence[memoryview], shape: Sequence[int]) -> Any:
        return self.inner._decode(backend, self.decompress(buffers, shape), shape)

    def decompress(self, buffers: Sequence[memoryview], shape: Sequence[int]) -> list[memoryview]:
        """Return the inner codec's buffers, after checking their sizes against the shape.

        Raises:
            MalformedFrame: this codec never writes such buffers for that shape.
        """
        sizes = [self._plain_size(buffer) for buffer in buffers]
        self.inner.check_sizes(shape, sizes)
        return [self._plain(buffer, size) for buffer, size in zip(buffers, sizes, strict=True)]

    def _plain_size(self, buffer: memoryview) -> int:
        """Return the decompressed size that a buffer declares."""
        if buffer[-1] == _PLAIN:
            return buffer.nbytes - 1
        if buffer[-1] != _FRAME:
            raise MalformedFrame(
                "the last byte of a buffer must be 0 (plain) or 1 (compressed)",
                field="flag",
                limit=[_PLAIN, _FRAME],
                value=buffer[-1],
            )
        try:
            size = int(self._library.frame_content_size(buffer[:-1]))  # -1: not declared
        except self._library.ZstdError as error:
            raise _invalid_frame(error) from error
        if size < buffer.nbytes:
            raise MalformedFrame(
                "a Zstandard frame must declare its content's size and be smaller than the content",
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
            raise _invalid_frame(error) from error
        if len(plain) != size:
            raise MalformedFrame(
                "the content of a compressed buffer does not have its declared size",
                field="compressed",
                limit=size,
                value=len(plain),
            )
        return memoryview(plain)


def _choose_smaller(plain: memoryview, frame: bytes) -> memoryview:
    if len(frame) < plain.nbytes:
        return memoryview(frame + bytes([_FRAME]))
    return memoryview(bytes(plain) + bytes([_PLAIN]))


def _invalid_frame(error: Exception) -> MalformedFrame:
    return MalformedFrame(
        "a compressed buffer must be exactly one Zstandard frame",
        field="compressed",
        value=str(error),
    )


def _import_zstandard(name: str) -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise UnknownCodec(
            "the library that this codec needs is not installed",
            field="codec",
            limit="zstandard",
            value=name,
            hint="pip install zstandard, or use the codec without +zstd",
        ) from error
    return zstandard
