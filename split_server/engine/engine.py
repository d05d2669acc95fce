"""The engine of one process: one device, within fixed memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from protocol.errors import Busy, SFPromptError, StepLost
from split_server.engine.api import (
    BackwardJob,
    BodyJob,
    ExchangeJob,
    ForwardJob,
    InferJob,
    StepKey,
)
from split_server.engine.body_cache import BodyCache
from split_server.engine.delivery import CompletionQueue
from split_server.engine.limits import EngineLimits
from split_server.engine.metrics import EngineFigures, RunFigures
from split_server.engine.prompt_sessions import Exchanges
from split_server.engine.requests import (
    Admitted,
    PendingRequest,
    RequestTracker,
    as_shown,
    require_same,
)
from split_server.engine.scheduler import Schedule
from split_server.engine.steps import CachedResponse, RetainedStep
from split_server.engine.tasks import (
    Forwarded,
    backward_task,
    forward_task,
    require_shape,
)
from split_server.engine.tuned_bodies import BodyTraining
from split_server.engine.worker import Executor, Worker
from split_server.models.body_key import BodyKey
from split_server.runtime.aio import run_on
from split_server.runtime.clock import Clock
from split_server.runtime.device import Placement, SideStreams, used_here

# Tokens of a batch beyond which a body gains nothing from more: a CPU core's matrix kernels are
# full at one or two thousand rows, a GPU's at some ten thousand.
_FULL_BATCH_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 32_768}


class Engine:
    """Runs the bodies of all runs on one device.

    Jobs become tasks; tasks of one kind share a batch, across participants and runs. A job that
    fails does not affect the others. `EngineLimits` bound the memory, whatever the number of
    participants; a job beyond them fails with `Busy`, which says when to retry.

    Tensors of jobs must be finite: the threads that decode requests check this, so that the worker
    never synchronises with the GPU. Results stay on the body's device and are complete there; they
    cross to the CPU in encoded form.
    """

    def __init__(
        self,
        bodies: BodyCache,
        placement: Placement,
        limits: EngineLimits,
        clock: Clock | None = None,
        figures: EngineFigures | None = None,
    ) -> None:
        self._figures = figures or EngineFigures()
        self._frozen = bodies
        self._tracker = RequestTracker(limits, placement.flowing, clock or Clock(), self._refused)
        self._lock = self._tracker.lock  # guards the tracker, the schedule and the sessions
        self._full_tokens = _FULL_BATCH_TOKENS.get(placement.device.type, 8192)
        self._schedule = Schedule(self._full_tokens, limits.max_batch_samples, limits.max_wait_s)
        self._completions = CompletionQueue(placement.device)
        self._streams = SideStreams(placement.device)
        self._joiner = ThreadPoolExecutor(1, "split-joiner")
        self._worker = Worker(
            self._schedule,
            Executor(bodies, placement, self._tracker.memory.sizes),
            self._figures,
            self._lock,
            self._tracker.memory.steps,
            limits.queued_bytes,
        )
        self._exchanges = Exchanges(
            self._tracker, self._worker, self._completions, placement.device
        )
        self._bodies = BodyTraining(
            self._tracker, self._worker, self._completions, placement.device
        )
        self._show()
        self._worker.start()

    async def forward(self, job: ForwardJob) -> Tensor:
        """Run a batch forward; retain the step for its backward, if ``job.backward``.

        Returns:
            Features [B, T', D].

        Raises:
            Busy: no memory is free now.
            TooLarge: the step exceeds the whole memory.
            IdempotencyKeyReused: another request has used this step.
            WrongShape: the body does not take this number of tokens or width.
        """
        with self._lock:
            if (known := self._tracker.known("forward", job.key, job.fingerprint)) is not None:
                return known
            pending = self._tracker.under_way(("forward", job.key)) or self._begin_forward(job)
        return await _result(pending, job.fingerprint, job.key)

    async def backward(self, job: BackwardJob) -> Tensor:
        """Run a retained step backward and drop it.

        Returns:
            The gradient [B, T, D] of the smashed data.

        Raises:
            StepLost: the step is not retained (any more).
            Busy, IdempotencyKeyReused, WrongShape
        """
        with self._lock:
            if (known := self._tracker.known("backward", job.key, job.fingerprint)) is not None:
                return known
            pending = self._tracker.under_way(("backward", job.key)) or self._begin_backward(job)
        return await _result(pending, job.fingerprint, job.key)

    async def exchange(self, job: ExchangeJob) -> Tensor:
        """Tune the session's prompts with the last batch's gradients; run the next batch forward.

        Returns:
            The next batch's features [B, T', D]; empty [0] after the last batch.

        Raises:
            StepLost: the session, or its last batch, is not retained (any more).
            Busy, TooLarge, IdempotencyKeyReused, WrongShape
        """
        with self._lock:
            if (known := self._exchanges.known(job)) is not None:
                return known
            pending = self._tracker.under_way(("exchange", job.key)) or self._exchanges.begin(job)
        return await _result(pending, job.fingerprint, job.key)

    def trained_prompts(self, run: str, participant: str, session: str) -> Tensor:
        """Return the prompts [L, P, D] of a finished session, on the CPU.

        Raises:
            StepLost: the session is lost or has not finished.
            NonFinite: its prompts are not finite.
        """
        with self._lock:
            found = self._exchanges.finished(run, participant, session)
        return found.trained()  # nothing changes it any more, and a device's queue may be long

    async def body_forward(self, job: BodyJob) -> Tensor:
        """Run a batch forward through the session's own body; number 0 begins the session.

        Returns:
            Features [B, T', D].

        Raises:
            StepLost: the session is lost, or this is not its next step.
            Busy: no memory is free now for a new session.
            TooLarge: the session exceeds the whole memory.
            IdempotencyKeyReused, InvalidField, WrongShape
        """
        with self._lock:
            if (known := self._bodies.known("forward", job)) is not None:
                return known
            pending = self._tracker.under_way(("forward", job.key)) or self._bodies.begin_forward(
                job
            )
        return await _result(pending, job.fingerprint, job.key)

    async def body_backward(self, job: BodyJob) -> Tensor:
        """Tune the session's body with the gradients.

        Returns:
            The gradient [B, T, D] of the smashed data.

        Raises:
            StepLost: the session, or this step of it, is lost.
            Busy, IdempotencyKeyReused, InvalidField, WrongShape
        """
        with self._lock:
            if (known := self._bodies.known("backward", job)) is not None:
                return known
            under_way = self._tracker.under_way(("backward", job.key))
            pending = under_way or self._bodies.begin_backward(job)
        return await _result(pending, job.fingerprint, job.key)

    def trained_body(self, run: str, participant: str, session: str) -> dict[str, Tensor]:
        """Return the body of a finished session, by names of a state, on the CPU.

        Raises:
            StepLost: the session is lost or has not finished.
            NonFinite: the body is not finite.
        """
        with self._lock:
            found = self._bodies.finished(run, participant, session)
        return found.trained()  # nothing changes it any more, and copying takes its time

    async def infer(self, job: InferJob) -> Tensor:
        """Run a batch forward and retain nothing. Other tasks run between the parts of a large job.

        Returns:
            Features [B, T', D].

        Raises:
            Busy, WrongShape
        """
        rows = max(1, self._full_tokens // job.tokens)
        parts = [await self._infer(part) for part in job.split(rows)]
        return (
            parts[0]
            if len(parts) == 1
            else await run_on(self._joiner, partial(self._joined, parts))
        )

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        try:
            with self._streams.own():  # behind no batch, and complete when it is handed on
                return torch.cat([used_here(part) for part in parts])
        except torch.OutOfMemoryError as error:
            raise as_shown(error) from error

    async def _infer(self, job: InferJob) -> Tensor:
        with self._lock:
            self._worker.require_room(job.smashed.nbytes)
            pending = self._tracker.open(None, 0)

            def ran(part: Forwarded) -> None:
                self._completions.send(part.features, pending.answer, pending.fail)

            nbytes = job.smashed.nbytes
            task = forward_task(job, "nothing", lambda _: job.prompts, ran, pending.fail, nbytes)
            self._worker.add(task)
        return await pending.result()

    def release(self, run: str, participant: str | None = None) -> None:
        """Free steps and sessions of a run, or of one participant. Thread-safe."""
        with self._lock:
            self._tracker.release(run, participant)
            self._exchanges.release(run, participant)
            self._bodies.release(run, participant)
            self._lock.notify()  # a graph may have waited for what is gone

    def prepare(self, body: BodyKey) -> None:
        """Load a body before its first job. Slow; thread-safe.

        Raises:
            InvalidField: its weights cannot be read.
        """
        self._frozen.get(body)

    def busy_error(self, why: str) -> Busy:
        """Build the error for a request that does not fit now, with ``retry_after_s`` estimated
        from the queue."""
        with self._lock:
            return self._worker.busy_error(why)

    def figures(self, run: str) -> RunFigures:
        """Return a run's counters."""
        return self._figures.of_run(run)

    def forget(self, run: str) -> None:
        """Free everything stored for a finished run, its counters included."""
        self.release(run)
        self._figures.forget(run)

    def sweep(self) -> None:
        """Drop steps and sessions whose next request has not come in time."""
        with self._lock:
            self._tracker.sweep()
            self._exchanges.sweep()
            self._bodies.sweep()
            self._lock.notify()

    def close(self) -> None:
        """Stop. Queued tasks fail with `Busy`."""
        self._worker.close()
        self._completions.close()
        self._joiner.shutdown()

    # Under the lock

    def _begin_forward(self, job: ForwardJob) -> PendingRequest:
        nbytes = job.smashed.nbytes
        self._worker.require_room(nbytes)
        if not job.backward:
            return self._begin_lone_forward(job, nbytes)
        admitted = self._tracker.admit(job, job.smashed, None, self._worker.busy_error)
        pending = self._tracker.open(("forward", job.key), job.fingerprint, admitted.nbytes)
        done = partial(self._ran_forward, job, pending, admitted)
        self._worker.add(
            forward_task(job, admitted.keep, lambda _: None, done, pending.fail, nbytes)
        )
        return pending

    def _begin_lone_forward(self, job: ForwardJob, nbytes: int) -> PendingRequest:
        """A forward without a backward: of it the answer alone is kept, for repeats."""
        pending = self._tracker.open(("forward", job.key), job.fingerprint)
        done = partial(self._ran_lone_forward, job, pending, self._tracker.releases_of(job.key))
        # Computed without a graph, with those whose input alone is kept.
        self._worker.add(forward_task(job, "input", lambda _: None, done, pending.fail, nbytes))
        return pending

    def _begin_backward(self, job: BackwardJob) -> PendingRequest:
        step = self._tracker.memory.steps.get(job.key)
        if step is None:
            raise _lost(job.key)
        require_shape(job.gradients, step)
        nbytes = job.gradients.nbytes
        self._worker.require_room(nbytes)
        pending = self._tracker.open(("backward", job.key), job.fingerprint)
        releases = self._tracker.releases_of(job.key)
        done = partial(self._ran_backward, job, step, pending, releases)
        fail = partial(self._broke_off, job, step, pending)
        self._worker.add(backward_task(job.key, step, job.gradients, done, fail, nbytes))
        return pending

    # On the worker, without the lock

    def _ran_forward(
        self, job: ForwardJob, pending: PendingRequest, admitted: Admitted, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._lock:
                self._tracker.retain(job, admitted, part, features)
            pending.answer(features)

        self._completions.send(part.features, deliver, pending.fail)

    def _ran_lone_forward(
        self, job: ForwardJob, pending: PendingRequest, releases: int, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._lock:
                if releases == self._tracker.releases_of(job.key):
                    self._tracker.remember(
                        "forward", job.key, CachedResponse(features, job.fingerprint)
                    )
            pending.answer(features)

        self._completions.send(part.features, deliver, pending.fail)

    def _ran_backward(
        self,
        job: BackwardJob,
        step: RetainedStep,
        pending: PendingRequest,
        releases: int,
        gradients: Tensor,
    ) -> None:
        def deliver(answer: Tensor) -> None:
            with self._lock:
                if releases == self._tracker.releases_of(job.key):
                    self._tracker.answered(job.key, step, CachedResponse(answer, job.fingerprint))
            pending.answer(answer)

        self._completions.send(gradients, deliver, pending.fail)

    def _broke_off(
        self, job: BackwardJob, step: RetainedStep, pending: PendingRequest, error: Exception
    ) -> None:
        """A backward has failed, and its graph may be spent: the forward must come again."""
        with self._lock:
            if self._tracker.memory.steps.get(job.key) is step:
                self._tracker.memory.steps.drop(job.key)
        pending.fail(error)

    def _refused(self, error: SFPromptError) -> None:
        self._figures.refused(error.code)

    def _waiting(self) -> tuple[int, int]:
        """How many tasks wait, and their samples. For any thread."""
        with self._lock:
            return len(self._schedule), self._schedule.samples

    def _show(self) -> None:
        watch, room = self._figures.watch, self._tracker.memory
        watch("sfprompt_engine_queue_tasks", "Tasks that wait", lambda: self._waiting()[0])
        watch("sfprompt_engine_queue_samples", "Their samples", lambda: self._waiting()[1])
        watch("sfprompt_engine_queue_bytes", "Their tensors", lambda: self._worker.queued_bytes)
        watch("sfprompt_engine_open_steps", "Steps that lack their backward", room.steps.__len__)
        watch("sfprompt_engine_retained_bytes", "Held for open steps", lambda: room.taken)
        watch("sfprompt_engine_bodies", "Frozen bodies in memory", self._frozen.__len__)
        watch("sfprompt_engine_own_bodies", "Bodies that sessions tune", self._bodies.__len__)
        watch(
            "sfprompt_engine_answer_bytes", "Held for repeats", lambda: self._tracker.response_bytes
        )


async def _result(pending: PendingRequest, fingerprint: int, key: StepKey) -> Tensor:
    require_same(pending.fingerprint, fingerprint, key)
    return await pending.result()


def _lost(key: StepKey) -> StepLost:
    return StepLost(
        "the server does not hold this step",
        field="step",
        value=key.step,
        hint="send its forward again",
    )
