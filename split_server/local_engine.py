"""The engine of one process: one worker on one device, within fixed memory."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protocol.errors import (
    Busy,
    IdempotencyKeyReused,
    InternalError,
    NonFinite,
    SFPromptError,
    StepLost,
    TooLarge,
)
from split_model import Body, anatomy
from split_server import compute
from split_server.bodies import Bodies, BodyKey
from split_server.clock import Clock
from split_server.devices import Placement
from split_server.engine import (
    BackwardJob,
    EngineLimits,
    ExchangeJob,
    ForwardJob,
    InferJob,
)
from split_server.sessions import (
    Session,
    Sessions,
    batch_key,
    lost_session,
)
from split_server.steps import Answer, Answers, RetainedStep, RetainedSteps, StepKey

log = logging.getLogger(__name__)


@dataclass
class _Ticket:
    """A job in the queue or at work."""

    work: Callable[[], Tensor]
    body: BodyKey
    nbytes: int
    reserved: int = 0  # of the retained bytes
    fingerprint: int = 0
    future: Future[Tensor] = field(default_factory=Future)


class LocalEngine:
    """One worker thread on one device, first come, first served.

    One job's failure is that job's alone. Memory is bounded by `EngineLimits`, whatever the
    number of participants; beyond, `Busy` says when to come back.
    """

    def __init__(
        self,
        bodies: Bodies,
        placement: Placement,
        limits: EngineLimits,
        clock: Clock | None = None,
    ) -> None:
        self._bodies = bodies
        self._placement = placement
        self._limits = limits
        self._clock = clock or Clock()
        self._wake = threading.Condition()  # guards all that follows
        self._queue: deque[_Ticket] = deque()
        self._queued_bytes = 0
        self._reserved_bytes = 0
        self._in_flight: dict[tuple[str, StepKey], _Ticket] = {}
        self._steps = RetainedSteps(limits.steps_per_participant)
        self._sessions = Sessions()
        self._answers = Answers(limits.steps_per_participant, limits.answer_bytes)
        self._releases: Counter[tuple[str, str | None]] = Counter()
        self._sizes = compute.StepSizes()
        self._seconds_per_job = 0.05  # a running mean
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="split-engine", daemon=True)
        self._worker.start()

    async def forward(self, job: ForwardJob) -> Tensor:
        """See `Engine.forward`."""
        with self._wake:
            if (known := self._known("forward", job.key, job.fingerprint)) is not None:
                return known
            ticket = self._in_flight.get(("forward", job.key))
            if ticket is None:
                need, releases = self._room_for(job.body, job.smashed), self._releases_of(job.key)
                ticket = _Ticket(
                    lambda: self._forward(job, releases),
                    job.body,
                    _nbytes(job.smashed),
                    need,
                    job.fingerprint,
                )
                self._enqueue(ticket, ("forward", job.key))
        return await _result(ticket, job.fingerprint, job.key)

    async def backward(self, job: BackwardJob) -> Tensor:
        """See `Engine.backward`."""
        with self._wake:
            if (known := self._known("backward", job.key, job.fingerprint)) is not None:
                return known
            ticket = self._in_flight.get(("backward", job.key))
            if ticket is None:
                if self._steps.get(job.key) is None:
                    raise _lost(job.key)
                ticket = _Ticket(
                    lambda: self._backward(job),
                    job.body,
                    _nbytes(job.gradients),
                    fingerprint=job.fingerprint,
                )
                self._enqueue(ticket, ("backward", job.key))
        return await _result(ticket, job.fingerprint, job.key)

    async def exchange(self, job: ExchangeJob) -> Tensor:
        """See `Engine.exchange`."""
        with self._wake:
            if (known := self._exchanged(job)) is not None:
                return known
            ticket = self._in_flight.get(("exchange", job.key))
            if ticket is None:
                ticket = self._exchange_ticket(job)
                self._enqueue(ticket, ("exchange", job.key))
        return await _result(ticket, job.fingerprint, job.key)

    def trained(self, run: str, participant: str, session: str) -> Tensor:
        """See `Engine.trained`."""
        with self._wake:
            found = self._sessions.get(run, participant, session)
            if found.applied != found.steps:
                raise lost_session(session)
            return found.trained()

    async def infer(self, job: InferJob) -> Tensor:
        """See `Engine.infer`."""
        with self._wake:
            ticket = _Ticket(lambda: self._infer(job), job.body, _nbytes(job.smashed))
            self._enqueue(ticket, None)
        return await asyncio.wrap_future(ticket.future)

    def release(self, run: str, participant: str | None = None) -> None:
        """See `Engine.release`."""

        def unwanted(key: StepKey) -> bool:
            return key.run == run and participant in (None, key.participant)

        with self._wake:
            self._releases[run, participant] += 1
            self._steps.drop_where(lambda key, _: unwanted(key))
            self._answers.drop_where(unwanted)
            self._sessions.drop(run, participant)

    def sweep(self) -> None:
        """See `Engine.sweep`."""
        with self._wake:
            self._sweep()

    def close(self) -> None:
        """See `Engine.close`."""
        with self._wake:
            self._closed = True
            waiting, self._queue = self._queue, deque()
            self._wake.notify_all()
        for ticket in waiting:
            ticket.future.set_exception(Busy("the server is shutting down", retry_after_s=5.0))
        self._worker.join(timeout=30)

    # Under the lock

    def _known(self, kind: str, key: StepKey, fingerprint: int) -> Tensor | None:
        answer = self._answers.get(kind, key)
        if answer is None and kind == "forward" and (step := self._steps.get(key)) is not None:
            answer = Answer(step.answer, step.fingerprint)
        if answer is None:
            return None
        _require_same(answer.fingerprint, fingerprint, key)
        return answer.tensor

    def _exchanged(self, job: ExchangeJob) -> Tensor | None:
        """What this very request was answered with, if it is a repeat of the newest one."""
        step = self._steps.get(job.key)
        if step is not None:
            _require_same(step.fingerprint, job.fingerprint, job.key)
            return step.answer
        if job.number == 0:
            if self._sessions.is_under_way(job.run, job.participant, job.session):
                raise lost_session(job.session)  # a late repeat must not begin it anew
            return None
        session = self._sessions.get(job.run, job.participant, job.session)
        done = job.number == job.steps == session.applied
        return torch.empty(0) if done else None

    def _exchange_ticket(self, job: ExchangeJob) -> _Ticket:
        releases = self._releases_of(job.key)
        waiting = [tensor for tensor in (job.gradients, job.smashed) if tensor is not None]
        if job.number == 0:  # begun anew: what was before makes room
            self._drop_steps(job.run, job.participant)
        last = self._steps.get(_before(job))
        return _Ticket(
            lambda: self._exchange(job, releases),
            job.body,
            sum(map(_nbytes, waiting)),
            # Its last batch makes room before this one takes it.
            0 if job.smashed is None else self._room_for(job.body, job.smashed, last),
            job.fingerprint,
        )

    def _room_for(
        self, body: BodyKey, smashed: Tensor, instead_of: RetainedStep | None = None
    ) -> int:
        depth = anatomy(body.settings).depth
        blocks = depth - body.settings.cut - body.settings.tail_blocks
        itemsize = self._placement.dtype.itemsize
        need = self._sizes.estimate(body, blocks, smashed, itemsize)
        limit = self._limits.retained_bytes
        if need > limit and self._sizes.is_known(body, smashed):
            raise TooLarge(
                "a batch of this size does not fit the memory that steps may take",
                field="smashed",
                limit=limit,
                value=need,
                hint="use a smaller batch_size, or raise engine_memory_mib",
            )
        need = min(need, limit)  # a guess may be too high
        if instead_of is not None:
            need = max(0, need - instead_of.nbytes)
        if self._steps.nbytes + self._reserved_bytes + need > limit:
            self._sweep()
        if self._steps.nbytes + self._reserved_bytes + need > limit:
            raise self._busy("the memory for open steps is taken")
        return need

    def _drop_steps(self, run: str, participant: str) -> None:
        self._steps.drop_where(lambda key, _: (key.run, key.participant) == (run, participant))

    def _releases_of(self, key: StepKey) -> int:
        """Changes when the steps of this one's run or participant are released."""
        return self._releases[key.run, None] + self._releases[key.run, key.participant]

    def _enqueue(self, ticket: _Ticket, name: tuple[str, StepKey] | None) -> None:
        if self._closed:
            raise Busy("the server is shutting down", retry_after_s=5.0)
        # One job is always let in, however large: a bound below it would refuse it for ever.
        if self._queue and self._queued_bytes + ticket.nbytes > self._limits.queued_bytes:
            raise self._busy("the queue is full")
        ticket.future.set_running_or_notify_cancel()  # one asker's going must not stop the others
        if name is not None:
            self._in_flight[name] = ticket
            ticket.future.add_done_callback(lambda _: self._land(name, ticket))
        self._queue.append(ticket)
        self._queued_bytes += ticket.nbytes
        self._reserved_bytes += ticket.reserved
        self._wake.notify()

    def _busy(self, why: str) -> Busy:
        wait = self._seconds_per_job * (len(self._queue) + 1)
        return Busy(f"{why}; try again later", retry_after_s=round(min(max(wait, 0.1), 10.0), 2))

    def _sweep(self) -> None:
        now = self._clock.monotonic()
        gone = self._steps.drop_where(lambda _, step: step.expires_at <= now)
        if gone:
            log.info("%d open steps were dropped: their backward did not come in time", gone)

    # On the worker

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                ticket = self._queue.popleft()
                self._queued_bytes -= ticket.nbytes
            self._run(ticket)

    def _run(self, ticket: _Ticket) -> None:
        began = time.perf_counter()
        result: Tensor | None = None
        error: BaseException | None = None
        try:
            result = ticket.work()
        except SFPromptError as refusal:
            error = refusal
        except torch.OutOfMemoryError:
            log.warning("a job did not fit the device's memory; it was sent away")
            torch.cuda.empty_cache()
            error = Busy("the device's memory is taken; try again later", retry_after_s=1.0)
        except Exception as unexpected:
            log.exception("a job failed")
            error = InternalError("the body failed on this batch")
            error.__cause__ = unexpected
        seconds = time.perf_counter() - began
        with self._wake:
            self._reserved_bytes -= ticket.reserved
            self._seconds_per_job += 0.1 * (seconds - self._seconds_per_job)
        if error is not None:
            ticket.future.set_exception(error)
        elif result is not None:
            ticket.future.set_result(result)

    def _land(self, name: tuple[str, StepKey], ticket: _Ticket) -> None:
        with self._wake:
            if self._in_flight.get(name) is ticket:
                del self._in_flight[name]

    def _forward(self, job: ForwardJob, releases: int) -> Tensor:
        body = self._bodies.get(job.body)
        smashed = compute.place_input(job.smashed, self._placement, "smashed")
        return self._retain(job, body, smashed, releases)

    def _retain(
        self,
        job: ForwardJob | ExchangeJob,
        body: Body,
        smashed: Tensor,
        releases: int,
        prompts: Tensor | None = None,
        last: StepKey | None = None,
    ) -> Tensor:
        """Run forward, keep the graph in the last one's place, and answer with the features."""
        leaf, features, nbytes = compute.run_forward(body, smashed, prompts, job.leading)
        answer = features.detach().cpu()
        step = RetainedStep(
            leaf=leaf,
            features=features,
            answer=answer,
            fingerprint=job.fingerprint,
            nbytes=nbytes,
            expires_at=self._clock.monotonic() + self._limits.step_timeout_s,
        )
        with self._wake:
            self._sizes.learn(job.body, smashed, nbytes)
            if last is not None:
                self._steps.drop(last)
            if releases == self._releases_of(job.key):  # else its round ended while it waited
                self._steps.add(job.key, step)
        return answer

    def _exchange(self, job: ExchangeJob, releases: int) -> Tensor:
        body = self._bodies.get(job.body)
        smashed = None
        if job.smashed is not None:
            smashed = compute.place_input(job.smashed, self._placement, "smashed")
        session = self._begin(job, smashed, releases) if job.number == 0 else self._apply(job)
        if smashed is not None:
            return self._retain(job, body, smashed, releases, session.prompts, _before(job))
        with self._wake:
            self._steps.drop(_before(job))
        return torch.empty(0)

    def _begin(self, job: ExchangeJob, smashed: Tensor | None, releases: int) -> Session:
        patches = None
        if smashed is not None:
            patches = smashed[:, anatomy(job.body.settings).prefix :]  # [B, N, D]
        session = Session.begin(job.session, job.steps, job.plan, self._placement.device, patches)
        with self._wake:
            self._drop_steps(job.run, job.participant)
            if releases == self._releases_of(job.key):
                self._sessions.begin(job.run, job.participant, session)
        return session

    def _apply(self, job: ExchangeJob) -> Session:
        """Bring the gradients of the last batch into the prompts, once.

        Its step is spent then, but keeps its room for the next one.
        """
        with self._wake:
            session = self._sessions.get(job.run, job.participant, job.session)
            step = self._steps.get(_before(job))
        if session.applied == job.number:  # a repeat, whose forward had failed
            return session
        if session.applied != job.number - 1 or step is None or job.gradients is None:
            raise lost_session(job.session)
        gradients = compute.place_input(job.gradients, self._placement, "gradients")
        try:
            session.apply(compute.run_backward(step, gradients))
        except (NonFinite, RuntimeError):  # spent for nothing: there is no second backward
            with self._wake:
                self._steps.drop(_before(job))
            raise
        return session

    def _backward(self, job: BackwardJob) -> Tensor:
        with self._wake:
            step = self._steps.get(job.key)
        if step is None:
            raise _lost(job.key)
        gradients = compute.place_input(job.gradients, self._placement, "gradients")
        result = compute.run_backward(step, gradients).cpu()
        with self._wake:
            self._steps.drop(job.key)
            self._answers.add("forward", job.key, Answer(step.answer, step.fingerprint))
            self._answers.add("backward", job.key, Answer(result, job.fingerprint))
        return result

    def _infer(self, job: InferJob) -> Tensor:
        body = self._bodies.get(job.body)
        smashed = compute.place_input(job.smashed, self._placement, "smashed")
        prompts = None
        if job.prompts is not None:
            prompts = compute.place_input(job.prompts, self._placement, "prompts")
        return compute.run_inference(body, smashed, prompts, job.leading).cpu()


def _before(job: ExchangeJob) -> StepKey:
    return batch_key(job.run, job.participant, job.session, job.number - 1)


async def _result(ticket: _Ticket, fingerprint: int, key: StepKey) -> Tensor:
    _require_same(ticket.fingerprint, fingerprint, key)
    return await asyncio.wrap_future(ticket.future)


def _require_same(first: int, second: int, key: StepKey) -> None:
    if first != second:
        raise IdempotencyKeyReused(
            "this step was used for another request", field="step", value=key.step
        )


def _lost(key: StepKey) -> StepLost:
    return StepLost(
        "the server does not hold this step",
        field="step",
        value=key.step,
        hint="send its forward again",
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
