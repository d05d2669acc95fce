"""What the engine holds of its jobs: tickets, retained steps, answers, and who has gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from protocol.errors import Busy, IdempotencyKeyReused, InternalError, SFPromptError
from split_server.engine.api import ExchangeJob, ForwardJob, StepKey
from split_server.engine.limits import EngineLimits
from split_server.engine.memory import MemoryBudget
from split_server.engine.steps import CachedResponse, ResponseCache, RetainedStep
from split_server.engine.tasks import Forwarded, Keep
from split_server.runtime.aio import deliver, refuse
from split_server.runtime.clock import Clock

log = logging.getLogger(__name__)

Name = tuple[str, StepKey]


@dataclass(eq=False)
class PendingRequest:
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
    on_end: Callable[[PendingRequest], None]
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


@dataclass(frozen=True)
class Admitted:
    """A forward that has its room.

    Attributes:
        keep, nbytes: what will be kept of it.
        releases: changes when the steps of its run or participant are released.
    """

    keep: Keep
    nbytes: int
    releases: int


class RequestTracker:
    """Holds what outlives a job. Not thread-safe: whoever calls holds ``lock``."""

    def __init__(
        self,
        limits: EngineLimits,
        dtype: torch.dtype,
        clock: Clock,
        refused: Callable[[SFPromptError], None],
    ) -> None:
        self.lock = threading.Condition()
        self.memory = MemoryBudget(
            limits.retained_bytes, limits.backward, limits.steps_per_participant, dtype
        )
        self._answers = ResponseCache(limits.steps_per_participant, limits.response_bytes)
        self._step_timeout_s = limits.step_timeout_s
        self._clock = clock
        self._refused = refused
        self._in_flight: dict[Name, PendingRequest] = {}
        self._graph_timeout_s = limits.graph_timeout_s
        self._releases: Counter[tuple[str, str | None]] = Counter()

    @property
    def response_bytes(self) -> int:
        return self._answers.nbytes

    @property
    def now(self) -> float:
        return self._clock.monotonic()

    @property
    def expiry(self) -> float:
        """Until when one who is heard of now is waited for, on the monotonic clock."""
        return self.now + self._step_timeout_s

    def is_at_work(self, run: str, participant: str) -> bool:
        """Whether a job of this participant waits or runs."""
        return any(_is_of(key, run, participant) for _, key in self._in_flight)

    def known(self, kind: str, key: StepKey, fingerprint: int) -> Tensor | None:
        """What this very request was answered with, if it is a repeat.

        Raises:
            IdempotencyKeyReused: its name was used for another request.
        """
        answer = self._answers.get(kind, key)
        if (
            answer is None
            and kind != "backward"
            and (step := self.memory.steps.get(key)) is not None
        ):
            answer = CachedResponse(step.answer, step.fingerprint)
        if answer is None:
            return None
        require_same(answer.fingerprint, fingerprint, key)
        return answer.tensor

    def under_way(self, name: Name) -> PendingRequest | None:
        return self._in_flight.get(name)

    def open(self, name: Name | None, fingerprint: int, reserved: int = 0) -> PendingRequest:
        """A pending for a job that begins now. Without a name nobody can repeat it."""
        self.memory.reserved += reserved
        pending = PendingRequest(fingerprint, self._refused, partial(self._close, name), reserved)
        if name is not None:
            self._in_flight[name] = pending
        return pending

    def admit(
        self,
        job: ForwardJob | ExchangeJob,
        smashed: Tensor,
        instead_of: StepKey | None,
        busy_error: Callable[[str], Busy],
    ) -> Admitted:
        """Room for a job's forward of ``smashed`` [B, T, D].

        Raises:
            Busy, TooLarge
        """
        ask = partial(self.memory.ask, job.body, smashed, job.num_tokens)
        found = ask(instead_of)
        if found is None:
            self.sweep()
            found = ask(instead_of) or self._in_its_place(job.key, ask)
        if found is None:
            raise busy_error("the memory for open steps is taken")
        return Admitted(*found, self.releases_of(job.key))

    def _in_its_place(
        self, key: StepKey, ask: Callable[[StepKey | None], tuple[Keep, int] | None]
    ) -> tuple[Keep, int] | None:
        """Room that the participant's own oldest step gives, where it has too many with this one.

        It goes at once: of several forwards that wait, only one can have its room.
        """
        oldest = self.memory.steps.next_to_go(key)
        if oldest is None or ask(oldest) is None:
            return None
        self.memory.steps.drop(oldest)
        return ask(None)

    def releases_of(self, key: StepKey) -> int:
        """Changes when the steps of this one's run or participant are released."""
        return self._releases[key.run, None] + self._releases[key.run, key.participant]

    def retain(
        self,
        job: ForwardJob | ExchangeJob,
        admitted: Admitted,
        part: Forwarded,
        answer: Tensor,
        last: StepKey | None = None,
    ) -> None:
        """Keep a forward for its backward, in the place of its session's last one."""
        if last is not None:
            self.memory.steps.drop(last)
        if admitted.releases != self.releases_of(job.key):
            return  # its round ended while it waited
        step = RetainedStep(
            body=job.body,
            smashed=part.smashed,
            prompts=part.prompts,
            num_tokens=job.num_tokens,
            answer=answer,
            fingerprint=job.fingerprint,
            expires_at=self.expiry,
            graph_until=self.now + self._graph_timeout_s,
            graph=part.graph,
        )
        self.memory.steps.add(job.key, step)

    def answered(self, key: StepKey, step: RetainedStep, answer: CachedResponse) -> None:
        """A step is over; its answers are kept for repeats."""
        self.memory.steps.drop(key)
        self.remember("forward", key, CachedResponse(step.answer, step.fingerprint))
        self.remember("backward", key, answer)

    def remember(self, kind: str, key: StepKey, answer: CachedResponse) -> None:
        """Keep an answer for repeats."""
        self._answers.add(kind, key, answer)

    def drop_steps(self, run: str, participant: str | None) -> None:
        self.memory.steps.drop_where(lambda key, _: _is_of(key, run, participant))

    def release(self, run: str, participant: str | None) -> None:
        """Free the steps and answers of a run, or of one participant."""
        self._count_release(run, participant)
        self.drop_steps(run, participant)
        self._answers.drop_where(lambda key: _is_of(key, run, participant))

    def sweep(self) -> None:
        """Free the steps whose backward has not come in time, and the graphs of slow ones."""
        now = self.now
        self.memory.steps.let_graphs_go(now)
        gone = self.memory.steps.drop_where(lambda _, step: step.expires_at <= now)
        if gone:
            log.info("%d open steps were dropped: their backward did not come in time", gone)

    def _count_release(self, run: str, participant: str | None) -> None:
        if participant is None:  # one number for all its participants, above what any has had
            own = [key for key in self._releases if key[0] == run]
            self._releases[run, None] = sum(self._releases.pop(key) for key in own)
        self._releases[run, participant] += 1

    def _close(self, name: Name | None, pending: PendingRequest) -> None:
        with self.lock:
            self.memory.reserved -= pending.reserved
            if name is not None and self._in_flight.get(name) is pending:
                del self._in_flight[name]


def _is_of(key: StepKey, run: str, participant: str | None) -> bool:
    return key.run == run and participant in (None, key.participant)
