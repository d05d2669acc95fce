"""Jobs made into tasks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from protocol.errors import WrongShape
from split_server.engine.jobs import ExchangeJob, ForwardJob, InferJob
from split_server.engine.steps import RetainedStep, StepKey
from split_server.engine.tasks import BackwardTask, Forwarded, ForwardTask, Keep, Kind

Fail = Callable[[Exception], None]


def forward_task(
    job: ForwardJob | ExchangeJob | InferJob,
    keep: Keep,
    prompts: Callable[[Tensor], Tensor | None],
    done: Callable[[Forwarded], None],
    fail: Fail,
    nbytes: int,
) -> ForwardTask:
    """The forward of a job that has smashed data."""
    smashed = job.smashed
    if smashed is None:
        raise ValueError("a job without smashed data has no forward")
    _, tokens, width = smashed.shape
    key = None if isinstance(job, InferJob) else job.key
    return ForwardTask(
        kind=Kind(job.body, int(tokens), int(width), job.leading, keep),
        sender=(job.run, job.participant),
        samples=len(smashed),
        nbytes=nbytes,
        fail=fail,
        smashed=smashed,
        prompts=prompts,
        key=key,
        done=done,
    )


def backward_task(
    key: StepKey,
    step: RetainedStep,
    gradients: Tensor,
    done: Callable[[Tensor], None],
    fail: Fail,
    nbytes: int,
) -> BackwardTask:
    """The backward of a retained step, with the gradient [B, T', D] of its features."""
    _, tokens, width = step.smashed.shape
    return BackwardTask(
        kind=Kind(step.body, int(tokens), int(width), step.leading, "graph"),
        sender=(key.run, key.participant),
        samples=len(gradients),
        nbytes=nbytes,
        fail=fail,
        key=key,
        step=step,
        gradients=gradients,
        done=done,
    )


def require_shape(gradients: Tensor, step: RetainedStep) -> None:
    """Refuse a gradient that is not one of the step's features.

    Raises:
        WrongShape: it has another shape.
    """
    if gradients.shape != step.answer.shape:
        raise WrongShape(
            "the gradient has another shape than the features of its step",
            field="gradients",
            limit=list(step.answer.shape),
            value=list(gradients.shape),
        )


def nbytes_of(tensor: Tensor) -> int:
    """Its bytes in memory."""
    return tensor.numel() * tensor.element_size()
