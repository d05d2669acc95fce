"""From the body's device to the CPU, without making the worker wait."""

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
class _Copy:
    """A copy that is on its way."""

    done: torch.cuda.Event
    host: Tensor
    deliver: Deliver
    fail: Fail


class Outbox:
    """Copies results to the CPU in the order of their computation.

    On the CPU there is nothing to copy or to wait for. On CUDA the copy goes into pinned memory
    behind the computation, and a thread waits for it while the worker queues the next batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._work, name="split-outbox", daemon=True)
            self._thread.start()

    def send(self, result: Tensor, deliver: Deliver, fail: Fail) -> None:
        """Call ``deliver`` with the tensor on the CPU, with memory of its own.

        Where that does not come about later on, ``fail`` is called instead.
        """
        result = result.detach()
        if self._thread is None:
            deliver(_alone(result) if result.device.type == "cpu" else result.cpu())
            return
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        host.copy_(result, non_blocking=True)
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(self._device))
        self._copying.put(_Copy(done, host, deliver, fail))

    def close(self) -> None:
        """Deliver what is on its way, then stop."""
        if self._thread is not None:
            self._copying.put(None)
            self._thread.join(timeout=30)

    def _work(self) -> None:
        while (entry := self._copying.get()) is not None:
            try:
                entry.done.synchronize()
                entry.deliver(entry.host)
            except Exception as error:
                entry.fail(error)
            del entry  # what its job holds, a graph say, is not kept while nothing is to do


def _alone(tensor: Tensor) -> Tensor:
    """The tensor itself, unless it is a part of a larger one that it would keep in memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
