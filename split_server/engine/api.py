"""The split plane's engine as the rest of the server sees it: jobs in, tensors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protocol.plan import TrainingPlan
from split_server.models.body_key import BodyKey


@dataclass(frozen=True)
class StepKey:
    """One step of one participant of one run."""

    run: str
    participant: str
    step: str


@dataclass(frozen=True)
class SessionPlan:
    """What a session needs to know of its run and round.

    Attributes:
        training: the run's settings for optimiser and rates.
        rounds: of the whole run, for the schedule.
        round: this one, from 1.
        initial: loads the prompts [L, P, D] of the global state.
        from_mean_token: shift the first layer's prompts by the mean token of the first batch.
    """

    training: TrainingPlan
    rounds: int
    round: int
    initial: Callable[[], Tensor]
    from_mean_token: bool = False


def batch_key(run: str, participant: str, session: str, number: int) -> StepKey:
    """The retained step of a session's batch."""
    return StepKey(run, participant, f"{session}/{number}")


@dataclass(frozen=True)
class BodyPlan:
    """What a session needs to know of its run and round.

    Attributes:
        training: the run's settings for optimiser and rates.
        rounds: of the whole run, for the schedule.
        round: this one, from 1.
        numbers: that are tuned.
    """

    training: TrainingPlan
    rounds: int
    round: int
    numbers: int

    @property
    def nbytes(self) -> int:
        """Of the weights, their gradients, and what the optimiser remembers of each."""
        moments = 2
        if self.training.optimizer == "sgd":
            moments = 1 if self.training.momentum else 0
        return torch.float32.itemsize * self.numbers * (2 + moments)


@dataclass(frozen=True)
class ForwardJob:
    """Smashed data of one step."""

    key: StepKey
    body: BodyKey
    smashed: Tensor  # [B, T, D]
    fingerprint: int  # of the request: a repeat has the same one
    num_tokens: int | None = None  # tokens of the features that are wanted; None: all
    backward: bool = True  # whether one may follow; without it nothing is kept for one

    @property
    def run(self) -> str:
        return self.key.run

    @property
    def participant(self) -> str:
        return self.key.participant


@dataclass(frozen=True)
class BackwardJob:
    """The gradient of one step's features."""

    key: StepKey
    body: BodyKey
    gradients: Tensor  # [B, T, D]
    fingerprint: int


@dataclass(frozen=True)
class ExchangeJob:
    """One request of a session: the last batch's gradients, and the next batch.

    See `protocol.messages.ExchangeMeta` for what ``number`` and ``steps`` mean.
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


@dataclass(frozen=True)
class BodyJob:
    """Either way of one step through the body that a session tunes.

    See `protocol.messages.BodyStepMeta` for what ``number`` and ``steps`` mean.
    """

    run: str
    participant: str
    session: str
    number: int
    steps: int
    body: BodyKey  # that the session begins with
    plan: BodyPlan
    tensor: Tensor  # smashed data [B, T, D], or the gradients [B, T', D] of their features
    fingerprint: int
    num_tokens: int | None = None

    @property
    def key(self) -> StepKey:
        return batch_key(self.run, self.participant, self.session, self.number)


@dataclass(frozen=True)
class InferJob:
    """Smashed data for which nothing is kept."""

    run: str
    participant: str
    body: BodyKey
    smashed: Tensor  # [B, T, D]
    prompts: Tensor | None = None  # [L, P, D], where they join at the cut
    num_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Of one sample in the body, prompts included."""
        return self.smashed.shape[1] + (0 if self.prompts is None else self.prompts.shape[1])

    def split(self, rows: int) -> list[InferJob]:
        """The same in jobs of at most so many samples."""
        return [replace(self, smashed=part) for part in self.smashed.split(rows)]
