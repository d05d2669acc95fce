"""Behind the computation, without making the worker wait."""

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
    """A result whose computation is queued on the GPU."""

    done: torch.cuda.Event
    result: Tensor
    deliver: Deliver
    fail: Fail


class CompletionQueue:
    """Delivers results in the order of their computation, each when it is complete.

    On the CPU there is nothing to wait for. On CUDA a thread waits while the worker queues the
    next batch; the result stays on the GPU, where it is encoded: what crosses is its wire form.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queued: queue.SimpleQueue[_Completion | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(
                target=self._work, name="split-completions", daemon=True
            )
            self._thread.start()

    def send(self, result: Tensor, deliver: Deliver, fail: Fail) -> None:
        """Call ``deliver`` with the complete tensor, with memory of its own.

        Where that does not come about later on, ``fail`` is called instead.
        """
        result = _alone(result.detach())
        if self._thread is None:
            deliver(result.cpu())
            return
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(self._device))
        self._queued.put(_Completion(done, result, deliver, fail))

    def close(self) -> None:
        """Deliver what is on its way, then stop."""
        if self._thread is not None:
            self._queued.put(None)
            self._thread.join(timeout=30)

    def _work(self) -> None:
        while (completion := self._queued.get()) is not None:
            try:
                completion.done.synchronize()
                completion.deliver(completion.result)
            except Exception as error:
                completion.fail(error)
            del completion  # what its job holds, a graph say, is not kept while nothing is to do


def _alone(tensor: Tensor) -> Tensor:
    """The tensor itself, unless it is a part of a larger one that it would keep in memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()
