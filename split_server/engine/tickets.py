"""The jobs that are under way, so that a repeat waits for the first instead of computing again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protocol.errors import Busy, IdempotencyKeyReused, InternalError, SFPromptError
from split_server.engine.steps import StepKey
from split_server.off_loop import deliver, refuse

log = logging.getLogger(__name__)

Name = tuple[str, StepKey]


@dataclass(eq=False)
class Ticket:
    """A job, until it is answered: once, by any thread. Any number may wait for the answer.

    It holds nobody who holds it: an answer's memory is free again as soon as it has been sent, not
    when a search for cycles happens to come by.

    Args:
        fingerprint: of its request.
        on_failure: is told what the asker is told.
        on_end: is called once, when it is answered.
        reserved: of the retained bytes.
    """

    fingerprint: int
    on_failure: Callable[[SFPromptError], None]
    on_end: Callable[[Ticket], None]
    reserved: int = 0
    _outcome: Tensor | SFPromptError | None = field(default=None, init=False)
    _waiting: list[asyncio.Future[Tensor]] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def answer(self, tensor: Tensor) -> None:
        self._end(tensor)

    def fail(self, error: Exception) -> None:
        """Answer with what went wrong, as the asker may know it."""
        shown = as_shown(error)
        self.on_failure(shown)
        self._end(shown)

    async def result(self) -> Tensor:
        """The answer, waited for; one asker's going does not stop the others.

        Raises:
            SFPromptError: the job has failed.
        """
        with self._lock:
            if self._outcome is None:
                waiting: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
                self._waiting.append(waiting)
            elif isinstance(self._outcome, SFPromptError):
                raise self._outcome
            else:
                return self._outcome
        return await waiting

    def _end(self, outcome: Tensor | SFPromptError) -> None:
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome = outcome
            waiting, self._waiting = self._waiting, []
        self.on_end(self)
        for one in waiting:
            if isinstance(outcome, SFPromptError):
                refuse(one, outcome)
            else:
                deliver(one, outcome)


def require_same(first: int, second: int, key: StepKey) -> None:
    """Refuse another request under the name of one that was.

    Raises:
        IdempotencyKeyReused: their fingerprints differ.
    """
    if first != second:
        raise IdempotencyKeyReused(
            "this step was used for another request", field="step", value=key.step
        )


def as_shown(error: Exception) -> SFPromptError:
    """What went wrong, as the asker may know it."""
    if isinstance(error, SFPromptError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        log.warning("a job did not fit the device's memory; it was sent away")
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        return Busy("the device's memory is taken; try again later", retry_after_s=1.0)
    log.error("a job failed", exc_info=error)
    shown = InternalError("the body failed on this batch")
    shown.__cause__ = error
    return shown
