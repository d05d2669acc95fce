"""The split plane's engine as the rest of the server sees it: jobs in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from split_server.bodies import BodyKey
from split_server.sessions import SessionPlan, batch_key
from split_server.steps import StepKey


@dataclass(frozen=True)
class ForwardJob:
    """Smashed data of one step."""

    key: StepKey
    body: BodyKey
    smashed: Tensor  # [B, T, D]
    fingerprint: int  # of the request: a repeat has the same one
    leading: int | None = None  # tokens of the features that are wanted; None: all


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
    leading: int | None = None

    @property
    def key(self) -> StepKey:
        return batch_key(self.run, self.participant, self.session, self.number)


@dataclass(frozen=True)
class InferJob:
    """Smashed data for which nothing is kept."""

    body: BodyKey
    smashed: Tensor  # [B, T, D]
    prompts: Tensor | None = None  # [L, P, D], where they join at the cut
    leading: int | None = None


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of the engine's memory and patience."""

    retained_bytes: int  # graphs between forward and backward
    queued_bytes: int  # tensors that wait for their turn
    answer_bytes: int  # answers kept for repeats
    step_timeout_s: float = 300.0
    steps_per_participant: int = 4


class Engine(Protocol):
    """What the routes need of the split plane. It may stand for one process or for many."""

    async def forward(self, job: ForwardJob) -> Tensor:
        """Features [B, T, D] on the CPU; the step is kept for its backward.

        Raises:
            Busy: no room now.
            TooLarge: no room ever.
            IdempotencyKeyReused: the step was another request.
            NonFinite, WrongShape
        """

    async def backward(self, job: BackwardJob) -> Tensor:
        """The gradient of the smashed data [B, T, D] on the CPU; the step is over.

        Raises:
            StepLost: the step is not kept (any more).
            Busy, IdempotencyKeyReused, NonFinite, WrongShape
        """

    async def exchange(self, job: ExchangeJob) -> Tensor:
        """Tune the session's prompts with the gradients; the next batch's features [B, T', D].

        After the last batch the answer is empty, [0].

        Raises:
            StepLost: the session, or its last batch, is not kept (any more).
            Busy, TooLarge, IdempotencyKeyReused, NonFinite, WrongShape
        """

    def trained(self, run: str, participant: str, session: str) -> Tensor:
        """The prompts [L, P, D] of a session that has come to its end, on the CPU.

        Raises:
            StepLost: it is not kept (any more), or not at its end.
            NonFinite: its prompts are not finite.
        """

    async def infer(self, job: InferJob) -> Tensor:
        """Features [B, T', D] on the CPU; nothing is kept.

        Raises:
            Busy, NonFinite, WrongShape
        """

    def release(self, run: str, participant: str | None = None) -> None:
        """Free steps and sessions of a run, or of one participant. Safe from any thread."""

    def sweep(self) -> None:
        """Free the steps whose backward has not come in time."""

    def close(self) -> None:
        """Stop. What waits is refused."""
