"""Exchanges: a session's gradients are applied to its prompts, then its next batch goes forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from protocol.errors import NonFinite
from split_model import anatomy
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress
from split_server.engine.api import ExchangeJob, SessionPlan, StepKey, batch_key
from split_server.engine.delivery import CompletionQueue
from split_server.engine.requests import Admitted, PendingRequest, RequestTracker
from split_server.engine.session_table import OpenSessions, lost_session, require_steps
from split_server.engine.tasks import (
    Forwarded,
    backward_task,
    forward_task,
    require_shape,
)
from split_server.engine.worker import Worker


@dataclass
class Session:
    """One participant's prompts and their optimiser, in float32 beside the body.

    The gradients of ``applied`` of its ``steps`` batches have been taken in.
    """

    name: str
    steps: int
    plan: SessionPlan
    prompts: nn.Parameter  # [L, P, D]
    optimizer: torch.optim.Optimizer = field(init=False)
    applied: int = 0
    expires_at: float = math.inf  # on the monotonic clock

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.plan.training, self.prompts, None)

    @classmethod
    def begin(
        cls, name: str, steps: int, plan: SessionPlan, device: torch.device, smashed: Tensor | None
    ) -> Session:
        """A session whose prompts are those of the global state.

        Args:
            name, steps, plan: see the class.
            device: where the prompts are tuned.
            smashed: the patch tokens [B, N, D] of the first batch, where the plan asks for them.
        """
        prompts = plan.initial().to(device, torch.float32).clone()
        if plan.from_mean_token and smashed is not None:
            prompts[0] += smashed.to(torch.float32).mean(dim=(0, 1))
        return cls(name, steps, plan, nn.Parameter(prompts))

    def apply(self, gradient: Tensor) -> None:
        """One step of the optimiser with the gradient [L, P, D] of the oldest open batch.

        Nobody waits for the device to see whether it is finite: `trained` does, in the end.
        """
        plan = self.plan
        progress = (plan.round - 1 + self.applied / self.steps) / plan.rounds
        set_progress(self.optimizer, learning_rate_factor(plan.training, progress, plan.rounds))
        self.prompts.grad = gradient.to(torch.float32)
        self.optimizer.step()
        self.applied += 1

    def current(self, _smashed: Tensor | None = None) -> Tensor:
        """The prompts [L, P, D] for the next batch, on the device."""
        return self.prompts.detach()

    @property
    def nbytes(self) -> int:
        """Of the prompts and what an optimiser keeps beside them: at most two moments."""
        return 4 * self.prompts.numel() * self.prompts.element_size()

    def trained(self) -> Tensor:
        """The prompts [L, P, D] as they are now: a copy on the CPU.

        Raises:
            NonFinite: a step of the optimiser has left float32's range.
        """
        prompts = self.prompts.detach().to("cpu", copy=True)
        if not bool(torch.isfinite(prompts).all()):
            raise NonFinite("the prompts tuned on the server are not finite", field="prompts")
        return prompts


class Exchanges:
    """The sessions of an engine, and what becomes of their requests.

    Methods without another word are called under the tracker's lock.
    """

    def __init__(
        self,
        tracker: RequestTracker,
        worker: Worker,
        completions: CompletionQueue,
        device: torch.device,
    ) -> None:
        self._tracker = tracker
        self._worker = worker
        self._completions = completions
        self._device = device
        self._sessions = OpenSessions[Session]()

    def known(self, job: ExchangeJob) -> Tensor | None:
        """What this very request was answered with, if it is a repeat of the newest one.

        Raises:
            StepLost: it is a late repeat, or its session is not here.
            IdempotencyKeyReused
            InvalidField: its session has another number of steps.
        """
        if (answer := self._tracker.known("exchange", job.key, job.fingerprint)) is not None:
            return answer
        if job.number == 0:
            begun = self._sessions.find(job.run, job.participant, job.session)
            if begun is not None and begun.applied > 0:
                raise lost_session(job.session)  # a late repeat must not begin it anew
            return None
        session = self._sessions.get(job.run, job.participant, job.session)
        require_steps(job.steps, session.steps)
        done = job.number == session.steps == session.applied
        return torch.empty(0) if done else None

    def begin(self, job: ExchangeJob) -> PendingRequest:
        """Put a request to work: its backward first, if it brings gradients.

        Raises:
            StepLost: it is not the next one of a session that is here.
            Busy, TooLarge, WrongShape
        """
        self._worker.require_room(_waiting_bytes(job))
        if job.number == 0:
            self._tracker.drop_steps(job.run, job.participant)  # begun anew: it makes room
            pending, admitted = self._open(job)
            first = partial(self._first, job, admitted)
            self._go_on(job, pending, admitted, first, _waiting_bytes(job))
            return pending
        session = self._sessions.get(job.run, job.participant, job.session)
        if session.applied == job.number:  # a repeat, whose forward had failed
            session.expires_at = self._tracker.expiry
            pending, admitted = self._open(job)
            self._go_on(job, pending, admitted, session.current, _waiting_bytes(job))
            return pending
        step = self._tracker.memory.steps.get(_before(job))
        if session.applied != job.number - 1 or step is None or job.gradients is None:
            raise lost_session(job.session)
        require_shape(job.gradients, step)
        pending, admitted = self._open(job)
        fail = partial(self._broke_off, job, pending)
        done = partial(self._apply, job, pending, admitted, session)
        task = backward_task(_before(job), step, job.gradients, done, fail, _waiting_bytes(job))
        self._worker.add(task)
        return pending

    def finished(self, run: str, participant: str, name: str) -> Session:
        """A session that has come to its end.

        Raises:
            StepLost: it is not here, or not at its end.
        """
        return self._sessions.finished(run, participant, name)

    def release(self, run: str, participant: str | None) -> None:
        self._sessions.drop(run, participant)
        self._account()

    def sweep(self) -> None:
        """Free the sessions that stopped half-way and were not heard of in time.

        Their runs may be over: a first batch can still be on its way here when that is told. Who
        has finished is waited for as long as the round is open: a slow link may hold the update.
        """
        for run, participant, session in self._sessions.expired(self._tracker.now):
            if session.applied == session.steps:
                continue
            step = batch_key(run, participant, session.name, session.applied)
            held = self._tracker.memory.steps.get(step) is not None
            if held or self._tracker.is_at_work(run, participant):
                session.expires_at = self._tracker.expiry
            else:
                self.release(run, participant)

    def _account(self) -> None:
        self._tracker.memory.others = self._sessions.nbytes

    def _open(self, job: ExchangeJob) -> tuple[PendingRequest, Admitted | None]:
        admitted = None
        if job.smashed is not None:
            admitted = self._tracker.admit(job, job.smashed, _before(job), self._worker.busy_error)
        reserved = 0 if admitted is None else admitted.nbytes
        name = ("exchange", job.key)
        return self._tracker.open(name, job.fingerprint, reserved), admitted

    def _go_on(
        self,
        job: ExchangeJob,
        pending: PendingRequest,
        admitted: Admitted | None,
        prompts: Callable[[Tensor], Tensor],
        nbytes: int = 0,
    ) -> None:
        """The forward of the next batch; after the last, nothing."""
        if job.smashed is None or admitted is None:
            self._tracker.memory.steps.drop(_before(job))
            pending.answer(torch.empty(0))
            return
        done = partial(self._ran_forward, job, pending, admitted)
        self._worker.add(forward_task(job, admitted.keep, prompts, done, pending.fail, nbytes))

    # On the worker, without the lock

    def _first(self, job: ExchangeJob, admitted: Admitted | None, smashed: Tensor) -> Tensor:
        """The prompts of a session that begins with this batch [B, T, D]."""
        patches = smashed[:, anatomy(job.body.settings).prefix :]  # [B, N, D]
        session = Session.begin(job.session, job.steps, job.plan, self._device, patches)
        with self._tracker.lock:
            session.expires_at = self._tracker.expiry
            self._tracker.drop_steps(job.run, job.participant)
            if admitted is not None and admitted.releases == self._tracker.releases_of(job.key):
                self._sessions.begin(job.run, job.participant, session)
                self._account()
        return session.current(smashed)

    def _apply(
        self,
        job: ExchangeJob,
        pending: PendingRequest,
        admitted: Admitted | None,
        session: Session,
        gradients: Tensor,
    ) -> None:
        """Bring the gradients [B, L, P, D] of the last batch into the prompts.

        Its step is spent then, but keeps its room for the next one.
        """
        session.apply(gradients.sum(dim=0))
        with self._tracker.lock:
            self._go_on(job, pending, admitted, session.current)

    def _broke_off(self, job: ExchangeJob, pending: PendingRequest, error: Exception) -> None:
        """A backward has failed, and its graph is spent: the device must begin anew."""
        with self._tracker.lock:
            self._tracker.memory.steps.drop(_before(job))
        pending.fail(error)

    def _ran_forward(
        self, job: ExchangeJob, pending: PendingRequest, admitted: Admitted, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._tracker.lock:
                self._tracker.retain(job, admitted, part, features, _before(job))
            pending.answer(features)

        self._completions.send(part.features, deliver, pending.fail)


def _before(job: ExchangeJob) -> StepKey:
    return batch_key(job.run, job.participant, job.session, job.number - 1)


def _waiting_bytes(job: ExchangeJob) -> int:
    return sum(t.nbytes for t in (job.gradients, job.smashed) if t is not None)
