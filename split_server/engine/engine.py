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
    EngineLimits,
    ExchangeJob,
    ForwardJob,
    InferJob,
    StepKey,
)
from split_server.engine.body_cache import BodyCache
from split_server.engine.delivery import CompletionQueue
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
    nbytes_of,
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


class LocalEngine:
    """One worker on one device, for all runs and participants.

    Jobs become tasks; tasks of one kind are computed together, whoever sent them. One job's failure
    is that job's alone. Memory is bounded by `EngineLimits`, whatever the number of participants;
    beyond, `Busy` says when to come back.
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
        self._keeper = RequestTracker(limits, placement.flowing, clock or Clock(), self._refused)
        self._lock = self._keeper.lock  # guards the keeper, the schedule and the sessions
        self._full_tokens = _FULL_BATCH_TOKENS.get(placement.device.type, 8192)
        self._schedule = Schedule(self._full_tokens, limits.max_batch_samples, limits.max_wait_s)
        self._outbox = CompletionQueue(placement.device)
        self._streams = SideStreams(placement.device)
        self._joiner = ThreadPoolExecutor(1, "split-joiner")
        self._worker = Worker(
            self._schedule,
            Executor(bodies, placement, self._keeper.room.sizes),
            self._figures,
            self._lock,
            self._keeper.room.steps,
            limits.queued_bytes,
        )
        self._exchanges = Exchanges(self._keeper, self._worker, self._outbox, placement.device)
        self._bodies = BodyTraining(self._keeper, self._worker, self._outbox, placement.device)
        self._show()
        self._worker.start()

    async def forward(self, job: ForwardJob) -> Tensor:
        """See `Engine.forward`."""
        with self._lock:
            if (known := self._keeper.known("forward", job.key, job.fingerprint)) is not None:
                return known
            ticket = self._keeper.under_way(("forward", job.key)) or self._begin_forward(job)
        return await _result(ticket, job.fingerprint, job.key)

    async def backward(self, job: BackwardJob) -> Tensor:
        """See `Engine.backward`."""
        with self._lock:
            if (known := self._keeper.known("backward", job.key, job.fingerprint)) is not None:
                return known
            ticket = self._keeper.under_way(("backward", job.key)) or self._begin_backward(job)
        return await _result(ticket, job.fingerprint, job.key)

    async def exchange(self, job: ExchangeJob) -> Tensor:
        """See `Engine.exchange`."""
        with self._lock:
            if (known := self._exchanges.known(job)) is not None:
                return known
            ticket = self._keeper.under_way(("exchange", job.key)) or self._exchanges.begin(job)
        return await _result(ticket, job.fingerprint, job.key)

    def trained(self, run: str, participant: str, session: str) -> Tensor:
        """See `Engine.trained`."""
        with self._lock:
            found = self._exchanges.finished(run, participant, session)
        return found.trained()  # nothing changes it any more, and a device's queue may be long

    async def body_forward(self, job: BodyJob) -> Tensor:
        """See `Engine.body_forward`."""
        with self._lock:
            if (known := self._bodies.known("forward", job)) is not None:
                return known
            ticket = self._keeper.under_way(("forward", job.key)) or self._bodies.begin_forward(job)
        return await _result(ticket, job.fingerprint, job.key)

    async def body_backward(self, job: BodyJob) -> Tensor:
        """See `Engine.body_backward`."""
        with self._lock:
            if (known := self._bodies.known("backward", job)) is not None:
                return known
            under_way = self._keeper.under_way(("backward", job.key))
            ticket = under_way or self._bodies.begin_backward(job)
        return await _result(ticket, job.fingerprint, job.key)

    def trained_body(self, run: str, participant: str, session: str) -> dict[str, Tensor]:
        """See `Engine.trained_body`."""
        with self._lock:
            found = self._bodies.finished(run, participant, session)
        return found.trained()  # nothing changes it any more, and copying takes its time

    async def infer(self, job: InferJob) -> Tensor:
        """See `Engine.infer`. A large job is done in full batches; others come between them."""
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
            self._worker.require_room(nbytes_of(job.smashed))
            ticket = self._keeper.open(None, 0)

            def ran(part: Forwarded) -> None:
                self._outbox.send(part.features, ticket.answer, ticket.fail)

            nbytes = nbytes_of(job.smashed)
            task = forward_task(job, "nothing", lambda _: job.prompts, ran, ticket.fail, nbytes)
            self._worker.add(task)
        return await ticket.result()

    def release(self, run: str, participant: str | None = None) -> None:
        """See `Engine.release`."""
        with self._lock:
            self._keeper.release(run, participant)
            self._exchanges.release(run, participant)
            self._bodies.release(run, participant)
            self._lock.notify()  # a graph may have waited for what is gone

    def prepare(self, body: BodyKey) -> None:
        """See `Engine.prepare`."""
        self._frozen.get(body)

    def busy_error(self, why: str) -> Busy:
        """See `Engine.busy_error`."""
        with self._lock:
            return self._worker.busy_error(why)

    def figures(self, run: str) -> RunFigures:
        """See `Engine.figures`."""
        return self._figures.of_run(run)

    def forget(self, run: str) -> None:
        """See `Engine.forget`."""
        self.release(run)
        self._figures.forget(run)

    def sweep(self) -> None:
        """See `Engine.sweep`."""
        with self._lock:
            self._keeper.sweep()
            self._exchanges.sweep()
            self._bodies.sweep()
            self._lock.notify()

    def close(self) -> None:
        """See `Engine.close`."""
        self._worker.close()
        self._outbox.close()
        self._joiner.shutdown()

    # Under the lock

    def _begin_forward(self, job: ForwardJob) -> PendingRequest:
        nbytes = nbytes_of(job.smashed)
        self._worker.require_room(nbytes)
        if not job.backward:
            return self._begin_lone_forward(job, nbytes)
        admitted = self._keeper.admit(job, job.smashed, None, self._worker.busy_error)
        ticket = self._keeper.open(("forward", job.key), job.fingerprint, admitted.nbytes)
        done = partial(self._ran_forward, job, ticket, admitted)
        self._worker.add(
            forward_task(job, admitted.keep, lambda _: None, done, ticket.fail, nbytes)
        )
        return ticket

    def _begin_lone_forward(self, job: ForwardJob, nbytes: int) -> PendingRequest:
        """A forward without a backward: of it the answer alone is kept, for repeats."""
        ticket = self._keeper.open(("forward", job.key), job.fingerprint)
        done = partial(self._ran_lone_forward, job, ticket, self._keeper.releases_of(job.key))
        # Computed without a graph, with those whose input alone is kept.
        self._worker.add(forward_task(job, "input", lambda _: None, done, ticket.fail, nbytes))
        return ticket

    def _begin_backward(self, job: BackwardJob) -> PendingRequest:
        step = self._keeper.room.steps.get(job.key)
        if step is None:
            raise _lost(job.key)
        require_shape(job.gradients, step)
        nbytes = nbytes_of(job.gradients)
        self._worker.require_room(nbytes)
        ticket = self._keeper.open(("backward", job.key), job.fingerprint)
        releases = self._keeper.releases_of(job.key)
        done = partial(self._ran_backward, job, step, ticket, releases)
        fail = partial(self._broke_off, job, step, ticket)
        self._worker.add(backward_task(job.key, step, job.gradients, done, fail, nbytes))
        return ticket

    # On the worker, without the lock

    def _ran_forward(
        self, job: ForwardJob, ticket: PendingRequest, admitted: Admitted, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._lock:
                self._keeper.retain(job, admitted, part, features)
            ticket.answer(features)

        self._outbox.send(part.features, deliver, ticket.fail)

    def _ran_lone_forward(
        self, job: ForwardJob, ticket: PendingRequest, releases: int, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._lock:
                if releases == self._keeper.releases_of(job.key):
                    self._keeper.remember(
                        "forward", job.key, CachedResponse(features, job.fingerprint)
                    )
            ticket.answer(features)

        self._outbox.send(part.features, deliver, ticket.fail)

    def _ran_backward(
        self,
        job: BackwardJob,
        step: RetainedStep,
        ticket: PendingRequest,
        releases: int,
        gradients: Tensor,
    ) -> None:
        def deliver(answer: Tensor) -> None:
            with self._lock:
                if releases == self._keeper.releases_of(job.key):
                    self._keeper.answered(job.key, step, CachedResponse(answer, job.fingerprint))
            ticket.answer(answer)

        self._outbox.send(gradients, deliver, ticket.fail)

    def _broke_off(
        self, job: BackwardJob, step: RetainedStep, ticket: PendingRequest, error: Exception
    ) -> None:
        """A backward has failed, and its graph may be spent: the forward must come again."""
        with self._lock:
            if self._keeper.room.steps.get(job.key) is step:
                self._keeper.room.steps.drop(job.key)
        ticket.fail(error)

    def _refused(self, error: SFPromptError) -> None:
        self._figures.refused(error.code)

    def _waiting(self) -> tuple[int, int]:
        """How many tasks wait, and their samples. For any thread."""
        with self._lock:
            return len(self._schedule), self._schedule.samples

    def _show(self) -> None:
        watch, room = self._figures.watch, self._keeper.room
        watch("sfprompt_engine_queue_tasks", "Tasks that wait", lambda: self._waiting()[0])
        watch("sfprompt_engine_queue_samples", "Their samples", lambda: self._waiting()[1])
        watch("sfprompt_engine_queue_bytes", "Their tensors", lambda: self._worker.queued_bytes)
        watch("sfprompt_engine_open_steps", "Steps that lack their backward", room.steps.__len__)
        watch("sfprompt_engine_retained_bytes", "Held for open steps", lambda: room.taken)
        watch("sfprompt_engine_bodies", "Frozen bodies in memory", self._frozen.__len__)
        watch("sfprompt_engine_own_bodies", "Bodies that sessions tune", self._bodies.__len__)
        watch("sfprompt_engine_answer_bytes", "Held for repeats", lambda: self._keeper.answer_bytes)


async def _result(ticket: PendingRequest, fingerprint: int, key: StepKey) -> Tensor:
    require_same(ticket.fingerprint, fingerprint, key)
    return await ticket.result()


def _lost(key: StepKey) -> StepLost:
    return StepLost(
        "the server does not hold this step",
        field="step",
        value=key.step,
        hint="send its forward again",
    )
