"""Prompt sessions: an exchange applies one batch's gradients and runs the next batch forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from protocol.errors import NonFinite
from split_model.backbone.architecture import anatomy
from split_model.checkpoints.state import PROMPTS
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress
from split_server.engine.api import ExchangeJob, SessionPlan, StepKey, batch_key
from split_server.engine.handler import SessionHandler
from split_server.engine.requests import Admission, PendingRequest
from split_server.engine.session_table import check_steps, lost_session_error
from split_server.engine.tasks import (
    Forwarded,
    check_gradient_shape,
    make_backward_task,
    make_forward_task,
)


@dataclass
class PromptSession:
    """One participant's prompts and their optimiser, in float32 on the body's device."""

    name: str
    steps: int
    plan: SessionPlan
    prompts: nn.Parameter  # [L, P, D]
    optimizer: torch.optim.Optimizer = field(init=False)
    applied: int = 0  # batches whose gradients have been applied
    expires_at: float = math.inf  # seconds on the monotonic clock

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.plan.training, self.prompts, None)

    @classmethod
    def begin(
        cls, name: str, steps: int, plan: SessionPlan, device: torch.device, smashed: Tensor | None
    ) -> PromptSession:
        """Begin a session with the global state's prompts.

        Args:
            name: the session's name.
            steps: number of its batches.
            plan: the run's and the round's part.
            device: where the prompts are tuned.
            smashed: the first batch's patch tokens [B, N, D], for ``plan.from_mean_token``.
        """
        prompts = plan.initial().to(device, torch.float32).clone()
        if plan.from_mean_token and smashed is not None:
            prompts[0] += smashed.to(torch.float32).mean(dim=(0, 1))
        return cls(name, steps, plan, nn.Parameter(prompts))

    def apply(self, gradient: Tensor) -> None:
        """Run one optimiser step with the gradient [L, P, D] of the oldest open batch.

        Does not wait for the device to check the result: `trained_prompts` does, at the end.
        """
        plan = self.plan
        progress = (plan.round - 1 + self.applied / self.steps) / plan.rounds
        set_progress(self.optimizer, learning_rate_factor(plan.training, progress, plan.rounds))
        self.prompts.grad = gradient.to(torch.float32)
        self.optimizer.step()
        self.applied += 1

    def current(self, _smashed: Tensor | None = None) -> Tensor:
        """Return the prompts [L, P, D] for the next batch, on the device."""
        return self.prompts.detach()

    @property
    def nbytes(self) -> int:
        """Bytes of the prompts, their gradient and at most two moments of an optimiser."""
        return 4 * self.prompts.nbytes

    def trained_prompts(self) -> Tensor:
        """Return a copy of the prompts [L, P, D] on the CPU.

        Raises:
            NonFinite: an optimiser step has left float32's range.
        """
        prompts = self.prompts.detach().to("cpu", copy=True)
        if not bool(torch.isfinite(prompts).all()):
            raise NonFinite("the prompts tuned on the server are not finite", field="prompts")
        return prompts

    def trained_state(self) -> dict[str, Tensor]:
        """Return the prompts as a state. See `trained_prompts`."""
        return {PROMPTS: self.trained_prompts()}


class PromptSessions(SessionHandler[ExchangeJob, PromptSession]):
    """Handles exchanges: each tunes the session's prompts, then runs its next batch forward."""

    job_types: ClassVar = (ExchangeJob,)

    def find_response(self, job: ExchangeJob) -> Tensor | None:
        """Return the response to the newest exchange, if ``job`` repeats it.

        Raises:
            StepLost: the job repeats an older exchange, or its session is lost.
            IdempotencyKeyReused: another request has used the job's name.
            InvalidField: its session has another number of steps.
        """
        if (response := super().find_response(job)) is not None:
            return response
        if job.number == 0:
            session = self._sessions.find(job.run, job.participant, job.session)
            if session is not None and session.applied > 0:
                raise lost_session_error(job.session)  # a late repeat must not restart the session
            return None
        session = self._sessions.get(job.run, job.participant, job.session)
        check_steps(job.steps, session.steps)
        is_finished = job.number == session.steps == session.applied
        return torch.empty(0) if is_finished else None

    def begin(self, job: ExchangeJob) -> PendingRequest:
        """Queue an exchange: its backward first, if it has gradients.

        Raises:
            StepLost: the job is not the next exchange of an open session.
            Busy, TooLarge, WrongShape
        """
        self._worker.check_queue((job.run, job.participant), _queued_bytes(job))
        if job.number == 0:
            self._tracker.drop_steps(job.run, job.participant)  # frees memory for the new session
            pending, admission = self._track(job)
            begin = partial(self._begin_session, job, admission)
            self._queue_forward(job, pending, admission, begin, _queued_bytes(job))
            return pending
        session = self._sessions.get(job.run, job.participant, job.session)
        if session.applied == job.number:  # a repeat whose forward has failed
            session.expires_at = self._tracker.expiry
            pending, admission = self._track(job)
            self._queue_forward(job, pending, admission, session.current, _queued_bytes(job))
            return pending
        step = self._tracker.memory.steps.get(_previous_batch(job))
        if session.applied != job.number - 1 or step is None or job.gradients is None:
            raise lost_session_error(job.session)
        check_gradient_shape(job.gradients, step.response.shape)
        pending, admission = self._track(job)
        done = partial(self._apply, job, pending, admission, session)
        fail = partial(self._fail_backward, job, pending)
        self._worker.add(
            make_backward_task(
                _previous_batch(job), step, job.gradients, done, fail, _queued_bytes(job)
            )
        )
        return pending

    def _retains_expired(self, run: str, participant: str, session: PromptSession) -> bool:
        """Whether an expired session stays open; extends its time if a request may still come.

        The first batch of a session may arrive after its run has ended: such sessions expire too. A
        finished session stays until its round ends, since a slow link may delay the update.
        """
        if session.applied == session.steps:
            return True
        step = batch_key(run, participant, session.name, session.applied)
        is_open = self._tracker.memory.steps.get(step) is not None
        if is_open or self._tracker.has_pending(run, participant):
            session.expires_at = self._tracker.expiry
            return True
        return False

    def _track(self, job: ExchangeJob) -> tuple[PendingRequest, Admission | None]:
        admission = None
        if job.smashed is not None:
            admission = self._tracker.admit(
                job, job.smashed, _previous_batch(job), self._worker.busy_error
            )
        reserved = 0 if admission is None else admission.nbytes
        return self._tracker.track(job.name, job.fingerprint, reserved), admission

    def _queue_forward(
        self,
        job: ExchangeJob,
        pending: PendingRequest,
        admission: Admission | None,
        prompts: Callable[[Tensor], Tensor],
        nbytes: int,
    ) -> None:
        """Queue the next batch's forward; after the last batch, respond at once."""
        if job.smashed is None or admission is None:
            self._tracker.memory.steps.drop(_previous_batch(job))
            pending.respond(torch.empty(0))
            return
        done = partial(self._finish_forward, job, pending, admission)
        self._worker.add(
            make_forward_task(job, admission.retention, prompts, done, pending.fail, nbytes)
        )

    # On the worker's thread, without the lock

    def _begin_session(
        self, job: ExchangeJob, admission: Admission | None, smashed: Tensor
    ) -> Tensor:
        """Begin a session with its first batch [B, T, D]; return its prompts [L, P, D]."""
        patches = smashed[:, anatomy(job.body.settings).prefix :]  # [B, N, D]
        session = PromptSession.begin(job.session, job.steps, job.plan, self._device, patches)
        with self._tracker.lock:
            session.expires_at = self._tracker.expiry
            self._tracker.drop_steps(job.run, job.participant)
            is_current = (
                admission is not None
                and admission.releases == self._tracker.count_releases(job.key)
            )
            if is_current:
                self._add_session(job.run, job.participant, session)
        return session.current(smashed)

    def _apply(
        self,
        job: ExchangeJob,
        pending: PendingRequest,
        admission: Admission | None,
        session: PromptSession,
        gradients: Tensor,
    ) -> None:
        """Apply the last batch's gradients [B, L, P, D] to the prompts.

        The batch's step stays retained until the next one replaces it.
        """
        session.apply(gradients.sum(dim=0))
        with self._tracker.lock:
            # The job's tensors left the queue with its backward.
            self._queue_forward(job, pending, admission, session.current, nbytes=0)

    def _fail_backward(self, job: ExchangeJob, pending: PendingRequest, error: Exception) -> None:
        """Drop the step of a failed backward: its graph is used up, the device must restart."""
        with self._tracker.lock:
            self._tracker.memory.steps.drop(_previous_batch(job))
        pending.fail(error)

    def _finish_forward(
        self, job: ExchangeJob, pending: PendingRequest, admission: Admission, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._tracker.lock:
                self._tracker.retain(job, admission, part, features, _previous_batch(job))
            pending.respond(features)

        self._completions.send(part.features, deliver, pending.fail)


def _previous_batch(job: ExchangeJob) -> StepKey:
    return batch_key(job.run, job.participant, job.session, job.number - 1)


def _queued_bytes(job: ExchangeJob) -> int:
    return sum(tensor.nbytes for tensor in (job.gradients, job.smashed) if tensor is not None)
