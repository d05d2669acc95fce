"""Steps through a frozen body: a forward, and in most runs its backward."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor

from protocol.errors import StepLost
from split_server.engine.api import BackwardJob, ForwardJob, StepKey
from split_server.engine.handler import JobHandler
from split_server.engine.requests import Admission, PendingRequest
from split_server.engine.steps import CachedResponse, RetainedStep
from split_server.engine.tasks import (
    Forwarded,
    check_gradient_shape,
    make_backward_task,
    make_forward_task,
)


class PlainSteps(JobHandler[ForwardJob | BackwardJob]):
    """Handles steps that depend on no session. The tracker stores all their state."""

    job_types: ClassVar = (ForwardJob, BackwardJob)

    def begin(self, job: ForwardJob | BackwardJob) -> PendingRequest:
        """Queue a forward or a backward.

        Raises:
            StepLost: the backward's step is not retained (any more).
            Busy, TooLarge, WrongShape
        """
        if isinstance(job, BackwardJob):
            return self._begin_backward(job)
        return self._begin_forward(job) if job.backward else self._begin_lone_forward(job)

    def _begin_forward(self, job: ForwardJob) -> PendingRequest:
        self._worker.check_queue((job.key.run, job.key.participant), job.smashed.nbytes)
        admission = self._tracker.admit(job, job.smashed, None, self._worker.busy_error)
        pending = self._tracker.track(job.name, job.fingerprint, admission.nbytes)
        done = partial(self._finish_forward, job, pending, admission)
        self._worker.add(make_forward_task(job, admission.retention, None, done, pending.fail))
        return pending

    def _begin_lone_forward(self, job: ForwardJob) -> PendingRequest:
        """Queue a forward without a backward: its response alone is cached."""
        self._worker.check_queue((job.key.run, job.key.participant), job.smashed.nbytes)
        pending = self._tracker.track(job.name, job.fingerprint)
        releases = self._tracker.count_releases(job.key)
        done = partial(self._finish_lone_forward, job, pending, releases)
        # "input": shares batches with the steps that retain no graph.
        self._worker.add(make_forward_task(job, "input", None, done, pending.fail))
        return pending

    def _begin_backward(self, job: BackwardJob) -> PendingRequest:
        step = self._tracker.memory.steps.get(job.key)
        if step is None:
            raise _lost_step_error(job.key)
        check_gradient_shape(job.gradients, step.response.shape)
        self._worker.check_queue((job.key.run, job.key.participant), job.gradients.nbytes)
        pending = self._tracker.track(job.name, job.fingerprint)
        releases = self._tracker.count_releases(job.key)
        done = partial(self._finish_backward, job, step, pending, releases)
        fail = partial(self._fail_backward, job, step, pending)
        self._worker.add(make_backward_task(job.key, step, job.gradients, done, fail))
        return pending

    # On the worker's thread, without the lock

    def _finish_forward(
        self, job: ForwardJob, pending: PendingRequest, admission: Admission, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._tracker.lock:
                self._tracker.retain(job, admission, part, features)
            pending.respond(features)

        self._completions.send(part.features, deliver, pending.fail)

    def _finish_lone_forward(
        self, job: ForwardJob, pending: PendingRequest, releases: int, part: Forwarded
    ) -> None:
        def deliver(features: Tensor) -> None:
            with self._tracker.lock:
                if releases == self._tracker.count_releases(job.key):
                    response = CachedResponse(features, job.fingerprint)
                    self._tracker.cache_response(job.name, response)
            pending.respond(features)

        self._completions.send(part.features, deliver, pending.fail)

    def _finish_backward(
        self,
        job: BackwardJob,
        step: RetainedStep,
        pending: PendingRequest,
        releases: int,
        gradients: Tensor,
    ) -> None:
        def deliver(result: Tensor) -> None:
            with self._tracker.lock:
                if releases == self._tracker.count_releases(job.key):
                    response = CachedResponse(result, job.fingerprint)
                    self._tracker.finish_step(job.key, step, response)
            pending.respond(result)

        self._completions.send(gradients, deliver, pending.fail)

    def _fail_backward(
        self, job: BackwardJob, step: RetainedStep, pending: PendingRequest, error: Exception
    ) -> None:
        """Drop the step of a failed backward, whose graph may be used up."""
        with self._tracker.lock:
            if self._tracker.memory.steps.get(job.key) is step:
                self._tracker.memory.steps.drop(job.key)
        pending.fail(error)


def _lost_step_error(key: StepKey) -> StepLost:
    return StepLost(
        "the server does not have this step",
        field="step",
        value=key.step,
        hint="send the step's forward again",
    )
