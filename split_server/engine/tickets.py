"""The jobs that are under way, so that a repeat waits for the first instead of computing again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protocol.errors import Busy, IdempotencyKeyReused, InternalError, SFPromptError
from split_server.engine.steps import StepKey

log = logging.getLogger(__name__)

Name = tuple[str, StepKey]


@dataclass(eq=False)
class Ticket:
    """A job, until it is answered."""

    fingerprint: int  # of its request
    on_failure: Callable[[SFPromptError], None]
    reserved: int = 0  # of the retained bytes
    future: Future[Tensor] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # one asker's going must not stop the others

    def answer(self, tensor: Tensor) -> None:
        self.future.set_result(tensor)

    def fail(self, error: Exception) -> None:
        """Answer with what went wrong, as the asker may know it."""
        shown = as_shown(error)
        self.on_failure(shown)
        if not self.future.done():
            self.future.set_exception(shown)

    async def result(self) -> Tensor:
        return await asyncio.wrap_future(self.future)


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
