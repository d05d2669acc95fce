"""torch as a backend of the codecs; imported only where torch is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as torch_api
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.arrays import Array, Backend, Device, Generator

__all__ = ["TorchBackend"]

_CACHE_BYTES = 768 * 1024  # chunk size on a CPU: a second pass still finds the chunk in L2

_DEVICE_BYTES = 64 * 1024 * 1024  # chunk size on other devices: few kernels, bounded scratch memory

_PINNED_BYTES = 32 * 1024 * 1024  # largest pinned copy: torch never frees pinned memory


class TorchBackend(Backend):
    """torch, on one device. Work on a CUDA device is queued on the current stream."""

    xp = torch_api
    linalg_error = torch.linalg.LinAlgError  # type: ignore[attr-defined]

    def __init__(self, device: Device) -> None:
        self.device = torch.device(device)
        self.chunk_bytes = _CACHE_BYTES if self.device.type == "cpu" else _DEVICE_BYTES

    def own(self, array: Array) -> Tensor:
        """Move an array here; to a GPU through pinned memory, without synchronising."""
        tensor = array.detach() if isinstance(array, Tensor) else _from_numpy(array)
        if (
            tensor.device.type != "cpu"
            or self.device.type != "cuda"
            or not 0 < tensor.nbytes <= _PINNED_BYTES
        ):
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def contiguous(self, array: Tensor) -> Tensor:
        return array.contiguous()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def host(self, array: Tensor) -> NDArray[Any]:
        plain = _to_host(array.contiguous())
        if plain.dtype == torch.bfloat16:
            plain = plain.view(torch.int16)
        return np.ascontiguousarray(plain.numpy())

    def draw(self, shape: Sequence[int], generator: Generator) -> Tensor:
        if isinstance(generator, np.random.Generator):
            return self.own(generator.random(tuple(shape), np.float32))
        drawn = torch.rand(tuple(shape), generator=generator, device=generator.device)
        return drawn.to(self.device)

    def to_bfloat16(self, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16).view(torch.int16)

    def from_bfloat16(self, bits: NDArray[np.int16]) -> Tensor:
        return self.own(bits).view(torch.bfloat16)

    def floor(self, values: Tensor) -> Tensor:
        return values.floor_()

    def clip(self, values: Tensor, low: float, high: float) -> Tensor:
        return values.clamp_(low, high)

    def magnitude(self, array: Tensor) -> float:
        # Two passes are faster than torch's aminmax. Each of these operations propagates NaN.
        return float(torch.maximum(-array.amin(), array.amax()))

    def kth_largest(self, values: Tensor, count: int) -> Tensor:
        return torch.topk(values, count, sorted=False).values.min()

    def add_product(
        self, bias: Tensor, left: Tensor, right: Tensor, out: Tensor, sign: int = 1
    ) -> Tensor:
        return torch.addmm(bias, left, right, alpha=sign, out=out)

    def argmin(self, scores: Tensor) -> Tensor:
        if scores.device.type != "cpu":
            return scores.argmin(1)
        # numpy's argmin is several times faster on the CPU than torch's.
        return torch.from_numpy(scores.numpy().argmin(1))

    def bincount(self, codes: Tensor, weights: Tensor | None, length: int) -> Tensor:
        return torch.bincount(codes, weights, length)


def _from_numpy(array: NDArray[Any]) -> Tensor:
    """Return a tensor in an array's memory; a copy, if it is read-only: torch writes to any."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _to_host(tensor: Tensor) -> Tensor:
    """Move a tensor to the CPU; from a GPU through pinned memory, after this stream's work."""
    if not tensor.is_cuda or tensor.nbytes > _PINNED_BYTES:
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # sleeps, where synchronising the stream would spin
    done.record(torch.cuda.current_stream(tensor.device))
    done.synchronize()
    return host
