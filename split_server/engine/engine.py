"""The engine: runs the bodies of all runs on one device, within fixed memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from protocol.errors import Busy, SFPromptError
from split_server.engine.api import InferJob, Job
from split_server.engine.body_cache import BodyCache
from split_server.engine.delivery import CompletionQueue
from split_server.engine.handler import EngineParts, HandlerFactory, JobHandler
from split_server.engine.limits import EngineLimits
from split_server.engine.metrics import EngineFigures, RunFigures
from split_server.engine.plain_steps import PlainSteps
from split_server.engine.prompt_sessions import PromptSessions
from split_server.engine.requests import RequestTracker, check_fingerprint, to_public_error
from split_server.engine.scheduler import Schedule
from split_server.engine.session_table import Session, lost_session_error
from split_server.engine.tasks import Forwarded, make_forward_task
from split_server.engine.worker import Executor, Worker
from split_server.models.body_key import BodyKey
from split_server.runtime.aio import run_on
from split_server.runtime.device import Placement, SideStreams, used_here
from split_server.runtime.process import Clock

# Tokens per batch beyond which a body gains nothing: a CPU core's matrix kernels are full at one or
# two thousand rows, a GPU's at some ten thousand.
_FULL_BATCH_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 32_768}


class Engine:
    """Runs the bodies of all runs on one device.

    A handler turns each job into tasks; tasks of one kind share a batch, across participants and
    runs. A job that fails does not affect the others. `EngineLimits` bound the memory, whatever the
    number of participants; a job beyond them fails with `Busy`, which says when to retry.

    Tensors of jobs must be finite: the threads that decode requests check this, so that the worker
    never synchronises with the GPU. Results stay on the body's device and are complete there; they
    cross to the CPU in encoded form.

    Args:
        bodies: the frozen bodies.
        placement: device and dtype of the bodies.
        limits: memory and waiting times.
        clock: for expiry times.
        figures: counters and gauges.
        handlers: handlers of further types of jobs, besides plain steps and prompt sessions.
    """

    def __init__(
        self,
        bodies: BodyCache,
        placement: Placement,
        limits: EngineLimits,
        clock: Clock | None = None,
        figures: EngineFigures | None = None,
        handlers: Sequence[HandlerFactory] = (),
    ) -> None:
        self._figures = figures or EngineFigures()
        self._bodies = bodies
        self._tracker = RequestTracker(
            limits, placement.flowing, clock or Clock(), self._count_failure
        )
        self._lock = self._tracker.lock  # guards the tracker, the schedule and the handlers
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
        self._parts = EngineParts(
            self._tracker, self._worker, self._completions, self._figures, placement.device
        )
        self._handlers: list[JobHandler[Any]] = []
        self._handler_by_type: dict[type[Any], JobHandler[Any]] = {}
        factories: list[HandlerFactory] = [PlainSteps, PromptSessions, *handlers]
        for factory in factories:
            self.add_handler(factory)
        self._watch_gauges()
        self._worker.start()

    def add_handler(self, factory: HandlerFactory) -> None:
        """Add a handler for further types of jobs, before the first of them is submitted.

        Raises:
            ValueError: another handler takes jobs of the same type.
        """
        handler = factory(self._parts)
        for job_type in handler.job_types:
            if job_type in self._handler_by_type:
                raise ValueError(f"a second handler for {job_type.__name__}")
            self._handler_by_type[job_type] = handler
        self._handlers.append(handler)

    async def submit(self, job: Job) -> Tensor:
        """Run a job with the handler of its type; wait for the response.

        A repeated request gets the response to the first, without running again.

        Returns:
            Of a `ForwardJob`, the features [B, T', D]; the step is retained for its backward.
            Of a `BackwardJob`, the gradient [B, T, D] of the smashed data; the step ends.
            Of an `ExchangeJob`, the next batch's features [B, T', D], after tuning the prompts with
            the last batch's gradients; empty [0] after the last batch.

        Raises:
            Busy: the queue is full, or no memory is free now.
            TooLarge: the job exceeds the whole memory.
            StepLost: the step or session is not retained (any more), or the job is not its next.
            IdempotencyKeyReused: another request has used the job's name.
            InvalidField: the session has another number of steps, or weights cannot be read.
            WrongShape: the body does not take this number of tokens or width, or gradients have
                another shape than their features.
        """
        handler = self._handler_by_type[type(job)]
        with self._lock:
            if (response := handler.find_response(job)) is not None:
                return response
            pending = self._tracker.find_pending(job.name) or handler.begin(job)
        check_fingerprint(pending.fingerprint, job.fingerprint, job.key)
        return await pending.result()

    def trained_state(self, run: str, participant: str, session: str) -> dict[str, Tensor]:
        """Return what a finished session has tuned, on the CPU, by names of a state.

        The prompts [L, P, D] of a prompt session are named "prompts". Thread-safe.

        Raises:
            StepLost: the session is lost or has not finished.
            NonFinite: a tensor is not finite.
        """
        with self._lock:
            found = self._find_session(run, participant, session)
            if found.applied != found.steps:
                raise lost_session_error(session)
        return found.trained_state()  # without the lock: the copy waits for the device

    def _find_session(self, run: str, participant: str, name: str) -> Session:
        for handler in self._handlers:
            session = handler.find_session(run, participant, name)
            if session is not None:
                return session
        raise lost_session_error(name)

    async def infer(self, job: InferJob) -> Tensor:
        """Run a forward that leaves no state. Other tasks run between the parts of a large job.

        Returns:
            Features [B, T', D].

        Raises:
            Busy, WrongShape
        """
        max_samples = max(1, self._full_tokens // job.tokens)
        parts = [await self._infer_part(part) for part in job.split(max_samples)]
        if len(parts) == 1:
            return parts[0]
        return await run_on(self._joiner, partial(self._join, parts))

    async def _infer_part(self, job: InferJob) -> Tensor:
        prompts = job.prompts
        with self._lock:
            self._worker.check_queue((job.run, job.participant), job.smashed.nbytes)
            pending = self._tracker.track(None, 0)

            def done(part: Forwarded) -> None:
                self._completions.send(part.features, pending.respond, pending.fail)

            give_prompts = None if prompts is None else lambda _: prompts
            self._worker.add(make_forward_task(job, "nothing", give_prompts, done, pending.fail))
        return await pending.result()

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        try:
            with self._streams.use():  # does not wait for queued batches; complete at its end
                return torch.cat([used_here(part) for part in parts])
        except torch.OutOfMemoryError as error:
            raise to_public_error(error) from error

    def locate(self, run: str, participant: str, address: str) -> None:
        """Remember the address of a participant's requests: addresses share the engine equally."""
        with self._lock:
            self._schedule.turns.locate((run, participant), address)

    def release(self, run: str, participant: str | None = None) -> None:
        """Free steps, sessions and responses of a run, or of one participant. Thread-safe."""
        with self._lock:
            self._tracker.release(run, participant)
            for handler in self._handlers:
                handler.release(run, participant)
            self._lock.notify()  # a graph may have waited for the gradients of a dropped step

    def prepare(self, body: BodyKey) -> None:
        """Load a body before its first job. Slow; thread-safe.

        Raises:
            InvalidField: its weights cannot be read.
        """
        self._bodies.get(body)

    def busy_error(self, reason: str) -> Busy:
        """Build the error for a request that does not fit now.

        Its ``retry_after_s`` is estimated from the queue.
        """
        with self._lock:
            return self._worker.busy_error(reason)

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
            for handler in self._handlers:
                handler.sweep()
            self._lock.notify()

    def close(self) -> None:
        """Stop after the running batch. Queued tasks fail with `Busy`."""
        self._worker.close()
        self._completions.close()
        self._joiner.shutdown()

    def _count_failure(self, error: SFPromptError) -> None:
        self._figures.count_refusal(error.code)

    def _queue_size(self) -> tuple[int, int]:
        """Return the numbers of queued tasks and of their samples. Thread-safe."""
        with self._lock:
            return len(self._schedule), self._schedule.samples

    def _watch_gauges(self) -> None:
        watch, memory, steps = self._figures.watch, self._tracker.memory, self._tracker.memory.steps
        watch("sfprompt_engine_queue_tasks", "Queued tasks", lambda: self._queue_size()[0])
        watch("sfprompt_engine_queue_samples", "Queued samples", lambda: self._queue_size()[1])
        watch("sfprompt_engine_queue_bytes", "Queued tensors", lambda: self._worker.queued_bytes)
        watch("sfprompt_engine_open_steps", "Steps without their backward", steps.__len__)
        watch("sfprompt_engine_retained_bytes", "Memory of open steps", lambda: memory.taken)
        watch("sfprompt_engine_bodies", "Frozen bodies in memory", self._bodies.__len__)
        watch(
            "sfprompt_engine_answer_bytes",
            "Responses cached for repeated requests",
            lambda: self._tracker.response_bytes,
        )
