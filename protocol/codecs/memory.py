"""Between tensors and the buffers of a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device
from protocol.errors import FieldValue, InvalidField

_CACHE_BYTES = 768 * 1024  # of float32 at a time on a CPU: what is read again is still in L2

_PINNED_BYTES = 32 * 1024 * 1024  # at a time: torch never gives back what it has pinned

_DEVICE_BYTES = 64 * 1024 * 1024  # elsewhere: few large kernels, and scratch memory has a bound


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor, row-major; a copy only where it is not contiguous or not here."""
    if tensor.numel() == 0:
        return memoryview(b"")
    plain = _fetched(tensor.detach().contiguous())
    # numpy knows no bfloat16, and a view of other elements takes a last dimension without gaps:
    # one of a single element counts as contiguous at any stride.
    if not plain.dim() or plain.stride(-1) != 1:
        plain = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    return plain.view(torch.uint8).numpy().data.cast("B")


def placed(tensor: Tensor, device: Device) -> Tensor:
    """A CPU tensor on ``device``; to a GPU it goes by pinned memory, and nobody waits for it."""
    if torch.device(device).type != "cuda" or not 0 < _nbytes(tensor) <= _PINNED_BYTES:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _fetched(tensor: Tensor) -> Tensor:
    """A tensor on the CPU; from a GPU it comes by pinned memory, behind this stream's work."""
    if not tensor.is_cuda or _nbytes(tensor) > _PINNED_BYTES:
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # sleeps; a stream would spin
    done.record(torch.cuda.current_stream(tensor.device))
    done.synchronize()
    return host


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def tensor_of(buffer: memoryview, dtype: torch.dtype, *shape: int) -> Tensor:
    """A CPU tensor of this dtype and shape in the memory of a buffer of just this size."""
    if buffer.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    # torch wants memory it may write to; a read-only buffer is copied once.
    memory = bytearray(buffer) if buffer.readonly else buffer
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """A shape as a matrix: how many rows, and the width of a row (the last dimension).

    A scalar is one row of one element; a tensor without elements has no row.
    """
    elements, width = math.prod(shape), shape[-1] if shape else 1
    return (elements // width, width) if elements else (0, 1)


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor as contiguous [rows, width] (see `rows_of`), without a copy where it is so."""
    return tensor.detach().reshape(rows_of(tensor.shape)).contiguous()


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows of float32 to work on at a time, so that they stay in the device's cache."""
    most = _CACHE_BYTES if device.type == "cpu" else _DEVICE_BYTES
    return max(1, most // (4 * max(width, 1)))


def round_(values: Tensor, generator: torch.Generator | None, low: int, high: int) -> Tensor:
    """Round in place: to nearest, ties to even, or at random by ``generator``, unbiased.

    At random a value goes to one of its two neighbours, to the upper one with a chance equal to
    its distance from the lower one. Nothing leaves ``low`` … ``high``, which the values may pass
    by a rounding error.
    """
    if generator is None:
        return values.round_()
    noise = torch.rand(values.shape, generator=generator, device=generator.device)
    return values.add_(noise.to(values.device)).floor_().clamp_(low, high)


def largest_magnitude(tensor: Tensor) -> float:
    """Of all elements; NaN if one is NaN, 0 if there is none."""
    if tensor.numel() == 0:
        return 0.0
    # Two passes: torch's aminmax is slower than both. NaN goes through each of these.
    return float(torch.maximum(-tensor.amin(), tensor.amax()))


def unit_for(largest: float) -> float:
    """A power of two just above a magnitude: dividing by it is exact, and no square overflows."""
    return 2.0 ** max(math.frexp(largest)[1], -100)


def within(values: Tensor, low: float, high: float) -> bool:
    """Whether all values (few, on the CPU) lie in a range. NaN lies in none."""
    if values.numel() == 0:
        return True
    return bool(values.amin() >= low) and bool(values.amax() <= high)


def extremes(*every: Tensor) -> list[FieldValue]:
    """The least and the greatest number of each of these tensors, for a refusal that shows them."""
    return [float(end) for values in every for end in (values.amin(), values.amax())]


def cannot_send(codec: str, limit: float, largest: float) -> InvalidField:
    """The refusal of NaN, infinity, or numbers too large for a codec."""
    return InvalidField(
        f"{codec} carries finite numbers of at most this magnitude alone",
        field="codec",
        limit=limit,
        value=largest,
        hint="send this tensor with float32, or find out why it is not finite",
    )
