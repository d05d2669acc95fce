"""The work that waits in the engine: pieces of jobs that may be computed together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from protocol.errors import WrongShape
from split_server.engine.api import ExchangeJob, ForwardJob, InferJob, StepKey
from split_server.engine.steps import Graph, RetainedStep
from split_server.models.body_key import BodyKey

Sender = tuple[str, str]  # run and participant: whose turn it is

Keep = Literal["graph", "input", "nothing"]  # what is kept of a forward


@dataclass(frozen=True)
class Kind:
    """Tasks of equal kinds may join one batch."""

    body: BodyKey
    tokens: int
    width: int
    num_tokens: int | None  # of the features' tokens: those that are wanted; None: all
    keep: Keep
    own: tuple[str, str, str] | None = None  # run, participant, session: whose weights alone


@dataclass(frozen=True)
class Forwarded:
    """One task's part of a forward."""

    features: Tensor  # [B, T', D] on the device
    smashed: Tensor  # [B, T, D] on the device, in the body's dtype
    prompts: Tensor | None  # [L, P, D]
    graph: Graph | None


@dataclass(eq=False, kw_only=True)
class Task:
    """A part of one participant's job.

    ``done`` and ``fail`` are called once, one of them, on the engine's worker.
    """

    kind: Kind
    sender: Sender
    samples: int
    nbytes: int  # of the queue, which it takes until its turn
    fail: Callable[[Exception], None]
    arrived: float = field(default=0.0, init=False)  # on the monotonic clock


@dataclass(eq=False, kw_only=True)
class ForwardTask(Task):
    """A forward of some samples.

    ``prompts`` is asked on the worker for those that join at the cut, [L, P, D], with the smashed
    data as they lie on the device.
    """

    smashed: Tensor  # [B, T, D]
    prompts: Callable[[Tensor], Tensor | None]
    key: StepKey | None  # of the step that is to be kept
    done: Callable[[Forwarded], None]


@dataclass(eq=False, kw_only=True)
class OwnTask(Task):
    """A forward or backward through weights that are one participant's own.

    ``run`` computes it on the worker, alone, and answers; what it raises goes to ``fail``.
    """

    run: Callable[[], None]
    work: str  # forward, backward or recompute, for the figures


@dataclass(eq=False, kw_only=True)
class BackwardTask(Task):
    """A backward of one retained step. ``done`` gets the gradient of its leaf, for each sample."""

    key: StepKey
    step: RetainedStep
    gradients: Tensor  # [B, T', D]
    done: Callable[[Tensor], None]


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
        kind=Kind(job.body, int(tokens), int(width), job.num_tokens, keep),
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
        kind=Kind(step.body, int(tokens), int(width), step.num_tokens, "graph"),
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
