"""Where a body runs and in which numbers: chosen, or checked where it was set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import InvalidField
from split_model import activation_dtype

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """A device, and the dtype that bodies multiply in there."""

    device: torch.device
    dtype: torch.dtype

    @property
    def flowing(self) -> torch.dtype:
        """The dtype of what a body takes and gives."""
        return activation_dtype(self.device, self.dtype)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_placement(device: str = "auto", dtype: str = "auto") -> Placement:
    """The device and dtype of the bodies.

    ``auto``: CUDA before MPS before the CPU; bfloat16 on a CUDA device that computes in it,
    float32 elsewhere. float16 is never chosen: gradients leave its range.

    Raises:
        InvalidField: the device is not there, or there is none of that name.
    """
    chosen = _choose_device(device)
    if dtype == "auto":
        fast = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return Placement(chosen, torch.bfloat16 if fast else torch.float32)
    if dtype not in _DTYPES:
        raise InvalidField("no such dtype", field="dtype", limit=["auto", *_DTYPES], value=dtype)
    return Placement(chosen, _DTYPES[dtype])


def _choose_device(name: str) -> torch.device:
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if name not in present:
        raise InvalidField("no such device", field="device", limit=["auto", *present], value=name)
    if not present[name]:
        raise InvalidField(
            "torch does not see this device here",
            field="device",
            limit=["auto", *(kind for kind, there in present.items() if there)],
            value=name,
        )
    return torch.device(name)


class SideStreams:
    """A stream for each thread that decodes or encodes. On any device but CUDA it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Queue what is done within on the thread's stream, and wait for it at the end.

        What was made within is complete behind it, for any stream.
        """
        if self._device.type != "cuda":
            yield
            return
        stream: torch.cuda.Stream | None = getattr(self._own, "stream", None)
        if stream is None:
            stream = self._own.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            yield
            done = torch.cuda.Event(blocking=True)  # which sleeps, where a stream would spin
            done.record(stream)
        done.synchronize()


class Ahead:
    """Keeps whoever queues batches on the GPU at most one batch ahead of it.

    Further ahead nothing is gained: what comes meanwhile would join a batch that is not queued
    yet, and nobody would know how long one takes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def queued(self) -> None:
        """A batch is on its way: wait until the one before it is through."""
        if self._device.type != "cuda":
            return
        before, self._last = self._last, torch.cuda.Event(blocking=True)
        self._last.record(torch.cuda.current_stream(self._device))
        if before is not None:
            before.synchronize()


def used_here(tensor: Tensor) -> Tensor:
    """A tensor that another stream may have made: its memory is not given away while this one
    has work queued that reads it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
