"""The choice of device and dtype, and CUDA streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import InvalidField
from split_model.layers.bfloat16 import activation_dtype

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """The device of the bodies, and the dtype of their matrix products."""

    device: torch.device
    dtype: torch.dtype

    @property
    def flowing(self) -> torch.dtype:
        """The dtype of a body's input and output."""
        return activation_dtype(self.device, self.dtype)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_placement(device: str = "auto", dtype: str = "auto") -> Placement:
    """Choose the device and the dtype of the bodies.

    The device ``auto`` is the first one present of CUDA, MPS and CPU. The dtype ``auto`` is
    bfloat16 on a CUDA device that supports it, otherwise float32. It is never float16, whose range
    is too small for gradients.

    Args:
        device: auto, cuda, mps or cpu.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        InvalidField: the device is not present, or a name is unknown.
    """
    chosen_device = _choose_device(device)
    if dtype == "auto":
        has_bfloat16 = chosen_device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return Placement(chosen_device, torch.bfloat16 if has_bfloat16 else torch.float32)
    if dtype not in _DTYPES:
        raise InvalidField("unknown dtype", field="dtype", limit=["auto", *_DTYPES], value=dtype)
    return Placement(chosen_device, _DTYPES[dtype])


def _choose_device(name: str) -> torch.device:
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, is_present in present.items() if is_present))
    if name not in present:
        raise InvalidField("unknown device", field="device", limit=["auto", *present], value=name)
    if not present[name]:
        raise InvalidField(
            "torch finds no such device on this machine",
            field="device",
            limit=["auto", *(kind for kind, is_present in present.items() if is_present)],
            value=name,
        )
    return torch.device(name)


class SideStreams:
    """A CUDA stream for each thread that decodes or encodes; without effect on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread_local = threading.local()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run the block on the thread's stream, and wait for the stream at the end of the block.

        Afterwards any stream may use the block's tensors.
        """
        if self._device.type != "cuda":
            yield
            return
        stream: torch.cuda.Stream | None = getattr(self._thread_local, "stream", None)
        if stream is None:
            stream = self._thread_local.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            yield
            done = torch.cuda.Event(blocking=True)  # waits without using the CPU
            done.record(stream)
        done.synchronize()


class BatchPacer:
    """Keeps the worker at most one batch ahead of the GPU.

    A longer lead would gain nothing. Later tasks can still join a batch that is not queued yet, and
    the worker can measure how long a batch takes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def wait_for_previous(self) -> None:
        """Record that a batch has been queued, and wait for the end of the batch before it."""
        if self._device.type != "cuda":
            return
        previous, self._last = self._last, torch.cuda.Event(blocking=True)
        self._last.record(torch.cuda.current_stream(self._device))
        if previous is not None:
            previous.synchronize()


def used_here(tensor: Tensor) -> Tensor:
    """Mark a tensor as used on the current stream, and return it.

    Needed if another stream allocated it: the allocator then reuses its memory only after the work
    that is queued on this stream.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
