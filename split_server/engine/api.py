"""Jobs: requests to the engine, decoded and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from protocol.plan import TrainingPlan
from split_server.models.body_key import BodyKey


@dataclass(frozen=True)
class StepKey:
    """One step of one participant of one run."""

    run: str
    participant: str
    step: str


JobName = tuple[str, StepKey]  # kind of job, step


def batch_key(run: str, participant: str, session: str, number: int) -> StepKey:
    """Return the key of the step that belongs to a session's batch."""
    return StepKey(run, participant, f"{session}/{number}")


class Job(Protocol):
    """What the engine needs to know of every job that it tracks."""

    @property
    def key(self) -> StepKey:
        """The job's step."""
        ...

    @property
    def name(self) -> JobName:
        """Identifies the job; a repeated request gives a job of the same name."""
        ...

    @property
    def fingerprint(self) -> int:
        """Hash of the request; tells a repeat from another request under the same name."""
        ...


@dataclass(frozen=True)
class ForwardJob:
    """One step's forward through a frozen body.

    Attributes:
        num_tokens: number of the features' tokens to return; None: all.
        backward: whether a backward may follow; if not, the step is not retained.
    """

    key: StepKey
    body: BodyKey
    smashed: Tensor  # [B, T, D]
    fingerprint: int
    num_tokens: int | None = None
    backward: bool = True

    @property
    def name(self) -> JobName:
        return "forward", self.key

    @property
    def run(self) -> str:
        return self.key.run

    @property
    def participant(self) -> str:
        return self.key.participant


@dataclass(frozen=True)
class BackwardJob:
    """The backward of a forward job's step."""

    key: StepKey
    body: BodyKey
    gradients: Tensor  # [B, T, D] of the step's features
    fingerprint: int

    @property
    def name(self) -> JobName:
        return "backward", self.key


@dataclass(frozen=True)
class SessionPlan:
    """The run's and the round's part of a prompt session.

    Attributes:
        training: the run's optimiser and learning rates.
        rounds: number of rounds in the run, for the learning rate schedule.
        round: number of this round, from 1.
        initial: loads the global state's prompts [L, P, D].
        from_mean_token: whether to shift the first layer's prompts by the mean token of the first
            batch.
    """

    training: TrainingPlan
    rounds: int
    round: int
    initial: Callable[[], Tensor]
    from_mean_token: bool = False


@dataclass(frozen=True)
class ExchangeJob:
    """One request of a prompt session: the last batch's gradients and the next batch.

    `protocol.messages.ExchangeMeta` explains ``number`` and ``steps``.
    """

    run: str
    participant: str
    session: str
    number: int
    steps: int
    body: BodyKey
    plan: SessionPlan
    gradients: Tensor | None  # [B, T', D] of the features of batch ``number - 1``
    smashed: Tensor | None  # [B, T, D] of batch ``number``
    fingerprint: int
    num_tokens: int | None = None

    @property
    def key(self) -> StepKey:
        return batch_key(self.run, self.participant, self.session, self.number)

    @property
    def name(self) -> JobName:
        return "exchange", self.key


@dataclass(frozen=True)
class InferJob:
    """A forward that leaves no state in the engine."""

    run: str
    participant: str
    body: BodyKey
    smashed: Tensor  # [B, T, D]
    prompts: Tensor | None = None  # [L, P, D], for a body with prompts at the cut
    num_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Number of one sample's tokens in the body, prompts included."""
        return self.smashed.shape[1] + (0 if self.prompts is None else self.prompts.shape[1])

    def split(self, max_samples: int) -> list[InferJob]:
        """Split the job into jobs of at most ``max_samples`` samples each."""
        return [replace(self, smashed=part) for part in self.smashed.split(max_samples)]
