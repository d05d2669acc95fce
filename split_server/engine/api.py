"""The split plane's engine as the rest of the server sees it: jobs in, tensors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from protocol.errors import Busy
from protocol.plan import TrainingPlan
from split_server.engine.metrics import RunFigures
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


FLOAT_BYTES = 4  # these bodies are float32, whatever those are that nobody tunes


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
        return FLOAT_BYTES * self.numbers * (2 + moments)


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


Backward = Literal["auto", "retained", "recompute"]


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of the engine's memory and patience, and how it joins what comes.

    Attributes:
        retained_bytes: what steps keep between forward and backward, and sessions, with bodies of
            their own.
        queued_bytes: of the tensors that wait for their turn.
        answer_bytes: of the answers kept for repeats.
        step_timeout_s: a step without its backward is dropped after this, and so is a body of a
            session that is not heard of.
        steps_per_participant: open ones; the oldest makes room.
        max_batch_samples: that are computed together; None: what the device gains from.
        max_wait_s: the longest that a forward waits for others while the device is idle.
        backward: whether a step keeps its graph (``retained``), or its input alone and runs its
            forward twice (``recompute``); ``auto``: its graph while there is room.
        graph_timeout_s: a step without its backward keeps its input alone after this.
    """

    retained_bytes: int
    queued_bytes: int
    answer_bytes: int
    step_timeout_s: float = 300.0
    steps_per_participant: int = 4
    max_batch_samples: int | None = None
    max_wait_s: float = 0.002
    backward: Backward = "auto"
    graph_timeout_s: float = 30.0


class Engine(Protocol):
    """What the routes need of the split plane. It may stand for one process or for many.

    Tensors of jobs are finite: whoever reads them from the network has seen to it, on a thread of
    its own, so that no batch waits for a look at its numbers. Answers are complete, and lie where
    the body is: what crosses to the CPU is their encoding.
    """

    async def forward(self, job: ForwardJob) -> Tensor:
        """Features [B, T, D]; the step is kept for its backward, if one may follow.

        Raises:
            Busy: no room now.
            TooLarge: no room ever.
            IdempotencyKeyReused: the step was another request.
            WrongShape
        """

    async def backward(self, job: BackwardJob) -> Tensor:
        """The gradient of the smashed data [B, T, D]; the step is over.

        Raises:
            StepLost: the step is not kept (any more).
            Busy, IdempotencyKeyReused, WrongShape
        """

    async def exchange(self, job: ExchangeJob) -> Tensor:
        """Tune the session's prompts with the gradients; the next batch's features [B, T', D].

        After the last batch the answer is empty, [0].

        Raises:
            StepLost: the session, or its last batch, is not kept (any more).
            Busy, TooLarge, IdempotencyKeyReused, WrongShape
        """

    def trained(self, run: str, participant: str, session: str) -> Tensor:
        """The prompts [L, P, D] of a session that has come to its end, on the CPU.

        Raises:
            StepLost: it is not kept (any more), or not at its end.
            NonFinite: its prompts are not finite.
        """

    async def body_forward(self, job: BodyJob) -> Tensor:
        """Features [B, T', D] of a batch, through the body of the session, which number 0 begins.

        Raises:
            StepLost: the session is not here (any more), or this is not its next step.
            Busy: no room now for a session that begins.
            TooLarge: no room ever.
            IdempotencyKeyReused, InvalidField, WrongShape
        """

    async def body_backward(self, job: BodyJob) -> Tensor:
        """Tune the session's body with the gradients; that of the smashed data [B, T, D].

        Raises:
            StepLost: the session, or this step of it, is not here (any more).
            Busy, IdempotencyKeyReused, InvalidField, WrongShape
        """

    def trained_body(self, run: str, participant: str, session: str) -> dict[str, Tensor]:
        """What a session that has come to its end has tuned, by names of a state, on the CPU.

        Raises:
            StepLost: it is not kept (any more), or not at its end.
            NonFinite: the body is not finite.
        """

    async def infer(self, job: InferJob) -> Tensor:
        """Features [B, T', D]; nothing is kept.

        Raises:
            Busy, WrongShape
        """

    def release(self, run: str, participant: str | None = None) -> None:
        """Free steps and sessions of a run, or of one participant. Safe from any thread."""

    def prepare(self, body: BodyKey) -> None:
        """Have a body in memory before its first job. Takes its time; for any thread.

        Raises:
            InvalidField: its weights cannot be read.
        """

    def busy_error(self, why: str) -> Busy:
        """The refusal of what has no room now, with when the queue will have been worked off."""

    def figures(self, run: str) -> RunFigures:
        """What was done for a run so far."""

    def forget(self, run: str) -> None:
        """A run is over: free all that is held for it, its figures too."""

    def sweep(self) -> None:
        """Free the steps whose backward has not come in time, and sessions left half-way."""

    def close(self) -> None:
        """Stop. What waits is refused."""
