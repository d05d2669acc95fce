"""Tasks: the parts of jobs that wait in the schedule and may share a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from protocol.errors import WrongShape
from split_server.engine.api import ExchangeJob, ForwardJob, InferJob, StepKey
from split_server.engine.steps import Graph, RetainedStep
from split_server.models.body_key import BodyKey

Sender = tuple[str, str]  # run and participant; senders take turns

Retention = Literal["graph", "input", "nothing"]  # what a forward retains for its backward

Fail = Callable[[Exception], None]


@dataclass(frozen=True)
class Kind:
    """Tasks of equal kinds may share a batch.

    Attributes:
        num_tokens: number of the features' tokens to return; None: all.
        session: run, participant and session whose weights the tasks use; None: the frozen body's.
    """

    body: BodyKey
    tokens: int
    width: int
    num_tokens: int | None
    retention: Retention
    session: tuple[str, str, str] | None = None


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

    The worker calls either ``done`` or ``fail``, once.
    """

    kind: Kind
    sender: Sender
    samples: int
    nbytes: int  # bytes in the queue
    fail: Fail
    arrived: float = field(default=0.0, init=False)  # seconds on the monotonic clock
    address: object = field(default=None, init=False)  # of the sender, while the task is queued


@dataclass(eq=False, kw_only=True)
class ForwardTask(Task):
    """A forward of some samples.

    Attributes:
        prompts: called on the worker with the smashed data on the device; returns the prompts
            [L, P, D] that join at the cut.
        key: the step to retain.
    """

    smashed: Tensor  # [B, T, D]
    prompts: Callable[[Tensor], Tensor] | None
    key: StepKey | None
    done: Callable[[Forwarded], None]


@dataclass(eq=False, kw_only=True)
class SessionTask(Task):
    """A forward or backward through weights that belong to one session; shares no batch.

    Attributes:
        run: computes on the worker and responds; ``fail`` gets what it raises.
        work: forward, backward or recompute, for the metrics.
    """

    run: Callable[[], None]
    work: str


@dataclass(eq=False, kw_only=True)
class BackwardTask(Task):
    """A backward of one retained step. ``done`` gets the gradient of the graph's leaf."""

    key: StepKey
    step: RetainedStep
    gradients: Tensor  # [B, T', D]
    done: Callable[[Tensor], None]


def make_forward_task(
    job: ForwardJob | ExchangeJob | InferJob,
    retention: Retention,
    prompts: Callable[[Tensor], Tensor] | None,
    done: Callable[[Forwarded], None],
    fail: Fail,
    nbytes: int | None = None,
) -> ForwardTask:
    """Make the task of a job's forward. ``nbytes`` defaults to the size of the smashed data."""
    smashed = job.smashed
    if smashed is None:
        raise ValueError("a job without smashed data has no forward")
    _, tokens, width = smashed.shape
    return ForwardTask(
        kind=Kind(job.body, int(tokens), int(width), job.num_tokens, retention),
        sender=(job.run, job.participant),
        samples=len(smashed),
        nbytes=smashed.nbytes if nbytes is None else nbytes,
        fail=fail,
        smashed=smashed,
        prompts=prompts,
        key=None if isinstance(job, InferJob) else job.key,
        done=done,
    )


def make_backward_task(
    key: StepKey,
    step: RetainedStep,
    gradients: Tensor,
    done: Callable[[Tensor], None],
    fail: Fail,
    nbytes: int | None = None,
) -> BackwardTask:
    """Make the task of a retained step's backward.

    ``gradients`` [B, T', D] belong to the step's features. ``nbytes`` defaults to their size.
    """
    _, tokens, width = step.smashed.shape
    return BackwardTask(
        kind=Kind(step.body, int(tokens), int(width), step.num_tokens, "graph"),
        sender=(key.run, key.participant),
        samples=len(gradients),
        nbytes=gradients.nbytes if nbytes is None else nbytes,
        fail=fail,
        key=key,
        step=step,
        gradients=gradients,
        done=done,
    )


def check_gradient_shape(gradients: Tensor, features: torch.Size) -> None:
    """Check that a gradient has the shape of its step's features.

    Raises:
        WrongShape: the shapes differ.
    """
    if gradients.shape != features:
        raise WrongShape(
            "the gradient has another shape than the features of its step",
            field="gradients",
            limit=list(features),
            value=list(gradients.shape),
        )
