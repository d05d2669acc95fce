"""Requests in progress, the steps they retain and the responses they may need again."""

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
from split_server.engine.api import ExchangeJob, ForwardJob, JobName, StepKey
from split_server.engine.limits import EngineLimits
from split_server.engine.memory import MemoryBudget
from split_server.engine.steps import CachedResponse, ResponseCache, RetainedStep
from split_server.engine.tasks import Forwarded, Retention
from split_server.runtime.aio import deliver, deliver_error
from split_server.runtime.process import Clock

log = logging.getLogger(__name__)


@dataclass(eq=False)
class PendingRequest:
    """The future response to a job. Any thread may set it, once; any number may await it.

    Keeps no reference cycle, so that a response's memory is freed as soon as it is sent.

    Args:
        fingerprint: of the request.
        on_failure: called with the error that the sender gets.
        on_end: called once, when the response is set.
        reserved: bytes of the memory budget reserved for the job.
    """

    fingerprint: int
    on_failure: Callable[[SFPromptError], None]
    on_end: Callable[[PendingRequest], None]
    reserved: int = 0
    _outcome: Tensor | SFPromptError | None = field(default=None, init=False)
    _waiting: list[asyncio.Future[Tensor]] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def respond(self, tensor: Tensor) -> None:
        """Set the response."""
        self._end(tensor)

    def fail(self, error: Exception) -> None:
        """Respond with an error, in the form that its sender may see."""
        public = to_public_error(error)
        self.on_failure(public)
        self._end(public)

    async def result(self) -> Tensor:
        """Wait for the response. Cancelling one wait does not affect the others.

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
        for future in waiting:
            if isinstance(outcome, SFPromptError):
                deliver_error(future, outcome)
            else:
                deliver(future, outcome)


def check_fingerprint(known: int, fingerprint: int, key: StepKey) -> None:
    """Check that a request repeats the earlier one of the same name.

    Raises:
        IdempotencyKeyReused: the fingerprints differ.
    """
    if known != fingerprint:
        raise IdempotencyKeyReused(
            "another request has used this step", field="step", value=key.step
        )


def to_public_error(error: Exception) -> SFPromptError:
    """Convert an error to the form that the request's sender may see."""
    if isinstance(error, SFPromptError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        log.warning("a job exceeded the device's memory; it was refused as busy")
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        return Busy("the device's memory is full; retry later", retry_after_s=1.0)
    log.error("a job failed", exc_info=error)
    public = InternalError("the body failed on this batch")
    public.__cause__ = error
    return public


@dataclass(frozen=True)
class Admission:
    """The memory that a forward may use.

    Attributes:
        retention: what the step will retain.
        nbytes: bytes reserved for it.
        releases: `RequestTracker.count_releases` at the time of admission.
    """

    retention: Retention
    nbytes: int
    releases: int


class RequestTracker:
    """Tracks what outlives a call: pending requests, retained steps and cached responses.

    Not thread-safe: callers hold ``lock``.

    Args:
        limits: the engine's limits.
        dtype: of the bodies' input and output.
        clock: for expiry times.
        on_failure: called with the error of every failed job.
    """

    def __init__(
        self,
        limits: EngineLimits,
        dtype: torch.dtype,
        clock: Clock,
        on_failure: Callable[[SFPromptError], None],
    ) -> None:
        self.lock = threading.Condition()
        self.memory = MemoryBudget(
            limits.retained_bytes, limits.backward, limits.steps_per_participant, dtype
        )
        self._responses = ResponseCache(limits.steps_per_participant, limits.response_bytes)
        self._step_timeout_s = limits.step_timeout_s
        self._graph_timeout_s = limits.graph_timeout_s
        self._clock = clock
        self._on_failure = on_failure
        self._pending: dict[JobName, PendingRequest] = {}
        self._releases: Counter[tuple[str, str | None]] = Counter()

    @property
    def response_bytes(self) -> int:
        """Bytes of the cached responses."""
        return self._responses.nbytes

    @property
    def now(self) -> float:
        """Seconds on the monotonic clock."""
        return self._clock.monotonic()

    @property
    def expiry(self) -> float:
        """When a step or session used now will expire, on the monotonic clock."""
        return self.now + self._step_timeout_s

    def has_pending(self, run: str, participant: str) -> bool:
        """Whether a job of this participant waits or runs."""
        return any(_belongs(key, run, participant) for _, key in self._pending)

    def find_pending(self, name: JobName) -> PendingRequest | None:
        """Return the request in progress of this name."""
        return self._pending.get(name)

    def find_response(self, name: JobName, fingerprint: int) -> Tensor | None:
        """Return the response to an earlier, equal request.

        Raises:
            IdempotencyKeyReused: another request has used this name.
        """
        kind, key = name
        response = self._responses.get(name)
        if response is None and kind != "backward" and (step := self.memory.steps.get(key)):
            response = CachedResponse(step.response, step.fingerprint)
        if response is None:
            return None
        check_fingerprint(response.fingerprint, fingerprint, key)
        return response.tensor

    def track(self, name: JobName | None, fingerprint: int, reserved: int = 0) -> PendingRequest:
        """Track a new job and reserve its memory. Without a name it cannot be repeated."""
        self.memory.reserved += reserved
        pending = PendingRequest(
            fingerprint, self._on_failure, partial(self._untrack, name), reserved
        )
        if name is not None:
            self._pending[name] = pending
        return pending

    def admit(
        self,
        job: ForwardJob | ExchangeJob,
        smashed: Tensor,
        replaces: StepKey | None,
        busy_error: Callable[[str], Busy],
    ) -> Admission:
        """Find memory for a job's forward of ``smashed`` [B, T, D].

        Args:
            job: the job.
            smashed: its smashed data.
            replaces: a step that will be dropped for it.
            busy_error: builds the error from a reason.

        Raises:
            Busy, TooLarge
        """
        choose = partial(self.memory.choose_retention, job.body, smashed, job.num_tokens)
        chosen = choose(replaces)
        if chosen is None:
            self.sweep()
            chosen = choose(replaces) or self._replace_oldest(job.key, choose)
        if chosen is None:
            raise busy_error("the memory for open steps is full")
        return Admission(*chosen, self.count_releases(job.key))

    def _replace_oldest(
        self, key: StepKey, choose: Callable[[StepKey | None], tuple[Retention, int] | None]
    ) -> tuple[Retention, int] | None:
        """Use the memory of the participant's oldest step, if it has one too many with this step.

        The oldest step is dropped at once: of several waiting forwards, one alone can use it.
        """
        oldest = self.memory.steps.next_replaced(key)
        if oldest is None or choose(oldest) is None:
            return None
        self.memory.steps.drop(oldest)
        return choose(None)

    def count_releases(self, key: StepKey) -> int:
        """Return a number that changes whenever the step's run or participant is released."""
        return self._releases[key.run, None] + self._releases[key.run, key.participant]

    def retain(
        self,
        job: ForwardJob | ExchangeJob,
        admission: Admission,
        part: Forwarded,
        response: Tensor,
        replaces: StepKey | None = None,
    ) -> None:
        """Retain a forward for its backward; drop the step that it replaces.

        Does nothing more if the round has ended since the job's admission.
        """
        if replaces is not None:
            self.memory.steps.drop(replaces)
        if admission.releases != self.count_releases(job.key):
            return
        step = RetainedStep(
            body=job.body,
            smashed=part.smashed,
            prompts=part.prompts,
            num_tokens=job.num_tokens,
            response=response,
            fingerprint=job.fingerprint,
            expires_at=self.expiry,
            graph_until=self.now + self._graph_timeout_s,
            graph=part.graph,
        )
        self.memory.steps.add(job.key, step)

    def finish_step(self, key: StepKey, step: RetainedStep, response: CachedResponse) -> None:
        """Drop a step after its backward; cache both responses."""
        self.memory.steps.drop(key)
        self.cache_response(("forward", key), CachedResponse(step.response, step.fingerprint))
        self.cache_response(("backward", key), response)

    def cache_response(self, name: JobName, response: CachedResponse) -> None:
        """Cache a response for repeated requests."""
        self._responses.add(name, response)

    def drop_steps(self, run: str, participant: str | None) -> None:
        """Drop the retained steps of a run, or of one participant."""
        self.memory.steps.drop_where(lambda key, _: _belongs(key, run, participant))

    def release(self, run: str, participant: str | None) -> None:
        """Free the steps and cached responses of a run, or of one participant."""
        self._count_release(run, participant)
        self.drop_steps(run, participant)
        self._responses.drop_where(lambda key: _belongs(key, run, participant))

    def sweep(self) -> None:
        """Drop expired steps, and the graphs of late ones."""
        now = self.now
        self.memory.steps.drop_late_graphs(now)
        dropped = self.memory.steps.drop_where(lambda _, step: step.expires_at <= now)
        if dropped:
            log.info("%d open steps were dropped: their backward did not come in time", dropped)

    def _count_release(self, run: str, participant: str | None) -> None:
        if participant is None:  # one number for all participants, higher than each of theirs
            participants = [key for key in self._releases if key[0] == run]
            self._releases[run, None] = sum(self._releases.pop(key) for key in participants)
        self._releases[run, participant] += 1

    def _untrack(self, name: JobName | None, pending: PendingRequest) -> None:
        with self.lock:
            self.memory.reserved -= pending.reserved
            if name is not None and self._pending.get(name) is pending:
                del self._pending[name]


def _belongs(key: StepKey, run: str, participant: str | None) -> bool:
    return key.run == run and participant in (None, key.participant)
