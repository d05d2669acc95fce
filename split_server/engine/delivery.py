"""Delivery of results that a GPU has yet to compute, without blocking the worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Deliver = Callable[[Tensor], None]

Fail = Callable[[Exception], None]


@dataclass(frozen=True)
class _Completion:
    """A result and the event that marks the end of its computation on the GPU."""

    done: torch.cuda.Event
    result: Tensor
    deliver: Deliver
    fail: Fail


class CompletionQueue:
    """Delivers results in the order of their computation, each when it is complete.

    On the CPU results are complete at once. On CUDA a thread waits for them while the worker queues
    the next batch. A result stays on the GPU, which encodes it: only its wire form crosses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queued: queue.SimpleQueue[_Completion | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            name = "split-completions"
            self._thread = threading.Thread(target=self._deliver_queued, name=name, daemon=True)
            self._thread.start()

    def send(self, result: Tensor, deliver: Deliver, fail: Fail) -> None:
        """Call ``deliver`` with the complete result, which shares memory with no other tensor.

        If the computation or the delivery fails later, call ``fail``.
        """
        result = _unshared(result.detach())
        if self._thread is None:
            deliver(result.cpu())
            return
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(self._device))
        self._queued.put(_Completion(done, result, deliver, fail))

    def close(self) -> None:
        """Deliver what is queued, then stop."""
        if self._thread is not None:
            self._queued.put(None)
            self._thread.join(timeout=30)

    def _deliver_queued(self) -> None:
        while (completion := self._queued.get()) is not None:
            try:
                completion.done.synchronize()
                completion.deliver(completion.result)
            except Exception as error:
                completion.fail(error)
            del completion  # frees what its job refers to, such as a graph, before the next wait


def _unshared(tensor: Tensor) -> Tensor:
    """Copy a part of a larger tensor, which would otherwise keep all of it in memory."""
    is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_whole else tensor.clone()
