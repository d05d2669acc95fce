"""Conversion between tensors and buffers, and the arithmetic that the codecs share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codecs.codec import Device
from protocol.errors import FieldValue, InvalidField
from protocol.wire import FLOAT32_BYTES

MAX_MAGNITUDE = 2.0**125  # largest magnitude, for codecs that compute with the whole tensor

MIN_SCALE = 2.0**-126  # the smallest normal float32: smaller scales lose precision

_CACHE_BYTES = 768 * 1024  # chunk size on a CPU: a second pass still finds the chunk in L2

_PINNED_BYTES = 32 * 1024 * 1024  # largest pinned copy: torch never frees pinned memory

_DEVICE_BYTES = 64 * 1024 * 1024  # chunk size on other devices: few kernels, bounded scratch memory


def tensor_nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, also if it is a view of a larger storage."""
    return tensor.numel() * tensor.element_size()


def to_buffer(tensor: Tensor) -> memoryview:
    """Return a tensor's memory, row-major; copied only if not contiguous or not on the CPU."""
    if tensor.numel() == 0:
        return memoryview(b"")
    plain = _to_host(tensor.detach().contiguous())
    # numpy has no bfloat16, and `view(dtype)` needs a last dimension without gaps. A dimension of
    # one element counts as contiguous at any stride.
    if not plain.dim() or plain.stride(-1) != 1:
        plain = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    return plain.view(torch.uint8).numpy().data.cast("B")


def from_buffer(buffer: memoryview, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a CPU tensor in the memory of a buffer that has exactly its size."""
    if buffer.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    # torch requires writable memory: copy a read-only buffer.
    memory = bytearray(buffer) if buffer.readonly else buffer
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def to_device(tensor: Tensor, device: Device) -> Tensor:
    """Move a CPU tensor to a device; to a GPU through pinned memory, without synchronising."""
    if torch.device(device).type != "cuda" or not 0 < tensor_nbytes(tensor) <= _PINNED_BYTES:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    """Move a tensor to the CPU; from a GPU through pinned memory, after this stream's work."""
    if not tensor.is_cuda or tensor_nbytes(tensor) > _PINNED_BYTES:
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # sleeps, where synchronising the stream would spin
    done.record(torch.cuda.current_stream(tensor.device))
    done.synchronize()
    return host


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and width of a shape seen as a matrix; the width is the last dimension.

    A scalar is one row of one element; a tensor without elements has no row.
    """
    elements, width = math.prod(shape), shape[-1] if shape else 1
    return (elements // width, width) if elements else (0, 1)


def to_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor as contiguous [rows, width] (see `matrix_shape`), if possible as a view."""
    return tensor.detach().reshape(matrix_shape(tensor.shape)).contiguous()


def rows_per_chunk(width: int, device: torch.device) -> int:
    """Return how many float32 rows of this width to process at once on a device."""
    chunk_bytes = _CACHE_BYTES if device.type == "cpu" else _DEVICE_BYTES
    return max(1, chunk_bytes // (FLOAT32_BYTES * max(width, 1)))


def round_in_place(
    values: Tensor, generator: torch.Generator | None, low: int, high: int
) -> Tensor:
    """Round to nearest, ties to even, or with a generator at random and without bias.

    Random rounding takes one of the two neighbours, the upper one with a probability equal to the
    distance from the lower one. It clips to ``low`` … ``high``, because a float32 rounding error
    can carry a value beyond.
    """
    if generator is None:
        return values.round_()
    noise = torch.rand(values.shape, generator=generator, device=generator.device)
    return values.add_(noise.to(values.device)).floor_().clamp_(low, high)


def max_magnitude(tensor: Tensor) -> float:
    """Return the largest absolute value: NaN if any element is NaN, 0 for an empty tensor."""
    if tensor.numel() == 0:
        return 0.0
    # Two passes are faster than torch's aminmax. Each of these operations propagates NaN.
    return float(torch.maximum(-tensor.amin(), tensor.amax()))


def check_magnitude(codec: str, tensor: Tensor) -> float:
    """Return the largest absolute value, at most `MAX_MAGNITUDE`.

    Raises:
        InvalidField: an element is NaN, infinite or too large.
    """
    magnitude = max_magnitude(tensor)
    if not magnitude <= MAX_MAGNITUDE:  # also refuses NaN
        raise range_error(codec, MAX_MAGNITUDE, magnitude)
    return magnitude


def power_of_two_above(magnitude: float) -> float:
    """Return a power of two just above: division by it is exact, and no square overflows."""
    return 2.0 ** max(math.frexp(magnitude)[1], -100)


def is_within(values: Tensor, low: float, high: float) -> bool:
    """Whether all values (a small CPU tensor) lie in a range. NaN lies in no range."""
    if values.numel() == 0:
        return True
    return bool(values.amin() >= low) and bool(values.amax() <= high)


def find_extremes(*tensors: Tensor) -> list[FieldValue]:
    """Return the least and the greatest number of each tensor, for an error's ``value``."""
    return [float(extreme) for values in tensors for extreme in (values.amin(), values.amax())]


def range_error(codec: str, limit: float, magnitude: float) -> InvalidField:
    """Build the error for NaN, infinity, or numbers too large for a codec."""
    return InvalidField(
        f"{codec} encodes only finite numbers up to this magnitude",
        field="codec",
        limit=limit,
        value=magnitude,
        hint="send this tensor with float32, or find out why it is not finite",
    )
