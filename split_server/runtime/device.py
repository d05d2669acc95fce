"""Devices: the choice of device and dtype, and CUDA streams."""

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
    """The bodies' device, and the dtype of their matrix products."""

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
    """Choose the bodies' device and dtype.

    ``auto`` prefers CUDA to MPS to the CPU, and bfloat16 on a CUDA device that supports it to
    float32. It never chooses float16, whose range gradients leave.

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
    """A CUDA stream for each thread that decodes or encodes; does nothing on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread_local = threading.local()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run the block's work on the thread's stream, and wait for it at the block's end.

        Afterwards its tensors are complete for any stream.
        """
        if self._device.type != "cuda":
            yield
            return
        stream: torch.cuda.Stream | None = getattr(self._thread_local, "stream", None)
        if stream is None:
            stream = self._thread_local.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            yield
            done = torch.cuda.Event(blocking=True)  # sleeps; synchronising a stream spins
            done.record(stream)
        done.synchronize()


class BatchPacer:
    """Keeps the worker at most one batch ahead of the GPU.

    More gains nothing: tasks that arrive meanwhile can join a batch that is not queued yet, and the
    worker could not measure a batch's duration.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def wait_for_previous(self) -> None:
        """Note that a batch has been queued; wait until the batch before it has finished."""
        if self._device.type != "cuda":
            return
        previous, self._last = self._last, torch.cuda.Event(blocking=True)
        self._last.record(torch.cuda.current_stream(self._device))
        if previous is not None:
            previous.synchronize()


def used_here(tensor: Tensor) -> Tensor:
    """Return a tensor that another stream may have made, for use on the current stream.

    The allocator reuses the tensor's memory only after the work queued on this stream.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
