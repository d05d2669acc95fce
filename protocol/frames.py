"""Frames: a msgpack header followed by the buffers of tensors. See SPEC.md, section 3.

    "SFPF" | version u16 | reserved u16 | header length u32 | total length u64 | checksum u64
    header | pad | buffer | pad | buffer | pad | ...

Integers are little-endian; every buffer starts at a multiple of 64 bytes. The checksum is the XXH3
of all other bytes, which takes a tenth of the time of a CRC-32.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from xxhash import xxh3_64

from protocol.codecs import Buffer, Codec, get_codec
from protocol.errors import (
    DamagedFrame,
    InvalidField,
    MalformedFrame,
    TooLarge,
    UnsupportedVersion,
)
from protocol.header import pack_header, unpack_header
from protocol.limits import DEFAULT_LIMITS, FrameLimits
from protocol.tensor_specs import TensorSpec, read_spec
from protocol.wire import PROTOCOL_VERSION

if TYPE_CHECKING:
    from torch import Tensor

    from protocol.arrays import Array, Device, Generator

__all__ = [
    "ALIGNMENT",
    "MAGIC",
    "PREFIX_BYTES",
    "Frame",
    "decode_frame",
    "encode_frame",
    "frame_length",
    "header_length",
    "join_frame",
    "require_kind",
]

MAGIC = b"SFPF"

ALIGNMENT = 64

_PREFIX = struct.Struct("<4sHHIQ")  # magic, version, reserved, header length, total length

_CHECKSUM = struct.Struct("<Q")

PREFIX_BYTES = _PREFIX.size + _CHECKSUM.size

_PADDING = bytes(ALIGNMENT)

Meter = Callable[[int], None]


@dataclass(frozen=True)
class Frame:
    """A decoded frame. The buffers are views of the received bytes."""

    kind: str
    meta: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    buffers: Mapping[str, tuple[memoryview, ...]] = field(repr=False)
    checksum: int  # checksum of all other bytes; identifies the frame
    meter: Meter | None = field(default=None, repr=False, compare=False)

    def spec(self, name: str) -> TensorSpec:
        """Return the description of one tensor.

        Raises:
            MalformedFrame: the frame has no tensor of this name.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise MalformedFrame(
                "a tensor is missing from the frame",
                field=name,
                limit=[name],
                value=sorted(self.specs),
            )
        return spec

    def array(self, name: str) -> NDArray[Any]:
        """Decode one tensor as a NumPy array, in the dtype of its codec; bfloat16 as float32.

        The array may share the frame's memory, and may be read-only.

        Raises:
            MalformedFrame: the frame has no tensor of this name, or no encoder writes its buffers.
            Busy: there is no memory for the array.
        """
        spec = self.spec(name)
        return self._metered_codec(spec).decode_array(self.buffers[name], spec.shape)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Decode all tensors as NumPy arrays, by name."""
        return {name: self.array(name) for name in self.specs}

    def tensor(self, name: str, device: Device = "cpu") -> Tensor:
        """Decode one tensor with torch on ``device``, in the dtype of its codec.

        Raises:
            MalformedFrame: the frame has no tensor of this name, or no encoder writes its buffers.
            Busy: there is no memory for the tensor.
        """
        spec = self.spec(name)
        return self._metered_codec(spec).decode(self.buffers[name], spec.shape, device)

    def tensors(self) -> dict[str, Tensor]:
        """Decode all tensors with torch on the CPU, by name."""
        return {name: self.tensor(name) for name in self.specs}

    def _metered_codec(self, spec: TensorSpec) -> Codec:
        codec = get_codec(spec.codec)
        if self.meter is not None:
            self.meter(codec.decoded_bytes(spec.shape, spec.sizes))
        return codec


def encode_frame(
    kind: str,
    meta: Mapping[str, Any],
    tensors: Mapping[str, tuple[Array, str]],
    limits: FrameLimits = DEFAULT_LIMITS,
    generators: Mapping[str, Generator] | None = None,
) -> list[memoryview]:
    """Encode a frame as pieces that are written one after the other.

    A contiguous array in the CPU's memory and in the dtype of its codec is not copied: the piece is
    the array's memory. The array must not change before the piece is written.

    Args:
        kind: the kind of message, e.g. ``forward``.
        meta: text, numbers, booleans, None, and lists and maps of these.
        tensors: each NumPy array or torch tensor, of any shape, and the name of its codec, by the
            tensor's name.
        limits: limits of the header.
        generators: generator of random rounding for a tensor, of NumPy or torch, by the tensor's
            name.

    Raises:
        UnknownCodec: there is no such codec.
        InvalidField: a codec cannot encode its tensor.
        MalformedFrame: ``meta`` has a value of a type that is not allowed, such as bytes or NaN.
        TooLarge: the header exceeds a limit.
    """
    specs: list[dict[str, Any]] = []
    payload: list[memoryview] = []
    for name, (tensor, codec) in tensors.items():
        buffers = get_codec(codec).encode(tensor, (generators or {}).get(name))
        sizes = tuple(buffer.nbytes for buffer in buffers)
        specs.append(TensorSpec(name, codec, tuple(tensor.shape), sizes).to_wire())
        payload.extend(buffers)
    header = pack_header(kind, dict(meta), specs)
    if len(header) > limits.max_header_bytes:
        raise _header_too_large(len(header), limits)
    unpack_header(header, limits)
    length = _align(PREFIX_BYTES + len(header))
    pieces = []
    for buffer in payload:
        length += _align(buffer.nbytes)
        pieces.append(buffer)
        if pad := _padding_for(buffer.nbytes):
            pieces.append(memoryview(pad))
    prefix = _PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, len(header), length)
    padded = header + _padding_for(PREFIX_BYTES + len(header))
    checksum = _CHECKSUM.pack(_checksum([prefix, padded, *pieces]))
    return [memoryview(prefix + checksum + padded), *pieces]


def frame_length(pieces: Sequence[memoryview]) -> int:
    """Return the length of an encoded frame in bytes."""
    return sum(piece.nbytes for piece in pieces)


def header_length(data: Buffer) -> int:
    """Return the header length in bytes that the prefix of a frame declares, unchecked."""
    _, _, _, length, _ = _PREFIX.unpack_from(bytes(data[:PREFIX_BYTES]).ljust(PREFIX_BYTES, b"\0"))
    return int(length)


def _checksum(pieces: Iterable[Buffer]) -> int:
    state = xxh3_64()
    for piece in pieces:
        state.update(piece)
    return int(state.intdigest())


def join_frame(pieces: Sequence[memoryview]) -> bytearray:
    """Join an encoded frame into one buffer, for a caller that cannot write pieces."""
    return bytearray(b"".join(pieces))


def decode_frame(
    data: Buffer, limits: FrameLimits = DEFAULT_LIMITS, meter: Meter | None = None
) -> Frame:
    """Decode a frame without copying its buffers.

    Every length is checked against ``limits`` and against the real number of bytes before memory
    is allocated for it.

    Args:
        data: the bytes of the frame.
        limits: limits of the frame.
        meter: called with the bytes that decoding a tensor needs, before they are allocated; an
            error that it raises ends the decoding.

    Raises:
        DamagedFrame: the checksum is wrong; the sender may send the frame again.
        MalformedFrame: the bytes are not a frame.
        TooLarge: a length is over its limit.
        UnsupportedVersion: the frame has another version of the protocol.
        UnknownCodec: this end does not have a tensor's codec.
    """
    view = memoryview(data).cast("B")
    checksum = _check_integrity(view, limits)
    header_bytes = _read_prefix(view, limits)
    end = PREFIX_BYTES + header_bytes
    kind, meta, raw_specs = unpack_header(view[PREFIX_BYTES:end], limits)
    _check_padding(view, end)
    specs, buffers = _read_tensors(view, _align(end), raw_specs, limits)
    return Frame(kind, meta, specs, buffers, checksum, meter)


def _check_integrity(view: memoryview, limits: FrameLimits) -> int:
    """Check length and checksum of a frame, and return the checksum.

    The checksum is checked before all other fields, since any of them may have been damaged on the
    way.
    """
    if view.nbytes > limits.max_frame_bytes:
        raise TooLarge(
            "the frame is too large",
            field="frame",
            limit=limits.max_frame_bytes,
            value=view.nbytes,
        )
    if view.nbytes < PREFIX_BYTES:
        raise MalformedFrame(
            "a frame must have at least the bytes of its prefix",
            field="length",
            limit=PREFIX_BYTES,
            value=view.nbytes,
        )
    (declared,) = _CHECKSUM.unpack_from(view, _PREFIX.size)
    found = _checksum([view[: _PREFIX.size], view[PREFIX_BYTES:]])
    if declared != found:
        raise DamagedFrame(
            "bytes of the frame changed on their way: its checksum does not fit",
            field="checksum",
            limit=f"{found:016x}",
            value=f"{declared:016x}",
            hint="send it again",
        )
    return found


def _read_prefix(view: memoryview, limits: FrameLimits) -> int:
    magic, version, reserved, header_bytes, total = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise MalformedFrame(
            "a frame must begin with its magic bytes",
            field="magic",
            limit="SFPF",
            value=magic.hex(),
        )
    if version != PROTOCOL_VERSION:
        raise UnsupportedVersion(
            "the frame has another version of the protocol",
            field="version",
            limit=PROTOCOL_VERSION,
            value=version,
            hint="install the same release on both ends",
        )
    if reserved != 0:
        raise MalformedFrame(
            "reserved bytes must be zero", field="reserved", limit=0, value=reserved
        )
    if header_bytes > limits.max_header_bytes:
        raise _header_too_large(header_bytes, limits)
    if total != view.nbytes:
        raise MalformedFrame(
            "the frame does not have its declared length",
            field="length",
            limit=view.nbytes,
            value=total,
        )
    if _align(PREFIX_BYTES + header_bytes) > total:
        raise MalformedFrame(
            "the header extends past the end of the frame",
            field="header",
            limit=total - PREFIX_BYTES,
            value=header_bytes,
        )
    return int(header_bytes)


def _read_tensors(
    view: memoryview, offset: int, raw_specs: list[Any], limits: FrameLimits
) -> tuple[dict[str, TensorSpec], dict[str, tuple[memoryview, ...]]]:
    specs: dict[str, TensorSpec] = {}
    buffers: dict[str, tuple[memoryview, ...]] = {}
    for raw in raw_specs:
        spec = read_spec(raw, limits)
        if spec.name in specs:
            raise MalformedFrame("two tensors have the same name", field="tensors", value=spec.name)
        pieces: list[memoryview] = []
        for size in spec.sizes:
            if offset + size > view.nbytes:
                raise MalformedFrame(
                    "a buffer extends past the end of the frame",
                    field=spec.name,
                    limit=view.nbytes,
                    value=offset + size,
                )
            pieces.append(view[offset : offset + size])
            _check_padding(view, offset + size)
            offset += _align(size)
        specs[spec.name] = spec
        buffers[spec.name] = tuple(pieces)
    if offset != view.nbytes:
        raise MalformedFrame(
            "the frame has bytes that belong to no tensor",
            field="length",
            limit=offset,
            value=view.nbytes,
        )
    return specs, buffers


def _align(length: int) -> int:
    """Round a length up to the next multiple of `ALIGNMENT`."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def _check_padding(view: memoryview, end: int) -> None:
    padding = view[end : _align(end)]
    if padding != _PADDING[: padding.nbytes]:
        raise MalformedFrame("padding must be zero", field="padding", limit=0, value=end)


def _header_too_large(length: int, limits: FrameLimits) -> TooLarge:
    return TooLarge(
        "the header is too large", field="header", limit=limits.max_header_bytes, value=length
    )


def _padding_for(length: int) -> bytes:
    return _PADDING[: _align(length) - length]


def require_kind(frame: Frame, kind: str) -> None:
    """Refuse a frame of another kind.

    Raises:
        InvalidField: the kind of the frame is not ``kind``.
    """
    if frame.kind != kind:
        raise InvalidField(
            "the frame has the wrong kind",
            field="kind",
            limit=kind,
            value=frame.kind,
        )
