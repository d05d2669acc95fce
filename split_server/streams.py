"""CUDA streams: copies and codecs run beside the batch that is being computed.

The body computes on the device's default stream. Requests are decoded and answers encoded on
streams of their threads, so that neither waits for a batch it has nothing to do with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
