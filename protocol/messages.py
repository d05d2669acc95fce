"""The messages of the federation plane (JSON) and the meta part of the split plane's frames."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, TypeVar

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from protocol.base import Message, extract_field, extract_limit
from protocol.errors import InvalidField
from protocol.plan import RunPlan, Text

__all__ = [
    "MAX_LOSS",
    "NEURONS",
    "SAMPLE_ID_BYTES",
    "Assignment",
    "BlobRef",
    "BodyStepMeta",
    "BytesByPhase",
    "Count",
    "EvaluationReport",
    "Event",
    "ExchangeMeta",
    "InferMeta",
    "JoinRequest",
    "JoinResponse",
    "Loss",
    "ParticipantView",
    "Results",
    "RoundStatus",
    "RoundView",
    "RunStatus",
    "RunView",
    "SamplesMeta",
    "Seconds",
    "Sha256",
    "StepId",
    "StepMeta",
    "Task",
    "UpdateMeta",
    "UpdateReceipt",
    "parse_message",
]

Count = Annotated[int, Field(ge=0, lt=2**53)]

Seconds = Annotated[float, Field(ge=0)]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

StepId = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]

SAMPLE_ID_BYTES = 16  # of a sample that the server keeps

NEURONS = "neurons"  # in an update: how often each of them was not above zero

MAX_LOSS = 1e9  # of one sample; more is no loss but a model that has diverged

Loss = Annotated[float, Field(ge=0, le=MAX_LOSS)]

BytesByPhase = dict[str, dict[str, int]]


class RunStatus(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"  # for its first participants
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in (RunStatus.FINISHED, RunStatus.CANCELLED, RunStatus.FAILED)


class RoundStatus(StrEnum):
    """Where one attempt at a round stands."""

    TRAINING = "training"  # updates are taken
    EVALUATING = "evaluating"  # the new global state is being measured
    CLOSED = "closed"
    REPEATED = "repeated"  # too few updates came; the same round was opened anew


class Task(StrEnum):
    """What a participant is to do next."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    WAIT = "wait"
    STOP = "stop"


class BlobRef(Message):
    """A file that the server holds, by the hash of its content."""

    sha256: Sha256
    nbytes: Count


class RunView(Message):
    """A run, as anybody who may see it sees it."""

    id: Text
    status: RunStatus
    reason: str | None = None  # why it failed or was cancelled
    settings: RunPlan
    round: Count  # the open round, from 1; 0 before the first
    participants: Count
    created_at: float  # seconds since 1970
    finished_at: float | None = None
    backbone_bytes: Count  # of the uncut model with its classifier, in float32
    head: BlobRef
    state: BlobRef  # the newest global state


class RoundView(Message):
    """One round, as it went."""

    round: Count
    attempt: Count
    status: RoundStatus
    opened_at: float
    closed_at: float | None = None
    sampled: tuple[str, ...]  # participants that were asked to train
    updated: tuple[str, ...] = ()  # those whose update was counted
    samples: Count = 0  # kept samples behind these updates
    train_loss: float | None = None  # mean over the kept samples, of split training
    local_loss: float | None = None  # mean over the samples of the local-loss update
    accuracy: float | None = None  # of the new global state on held-out samples
    evaluation_loss: float | None = None
    evaluation_samples: Count = 0
    epsilon: float | None = None  # of all rounds so far, where they are noised (federation.dp_…)
    traffic: BytesByPhase = {}
    state: BlobRef | None = None  # the global state that the round made


class ParticipantView(Message):
    """A participant, as the run's owner sees it."""

    id: Text
    name: Text
    train_samples: Count
    test_samples: Count
    joined_at: float
    left_at: float | None = None
    traffic: BytesByPhase = {}


class Results(Message):
    """Everything that a run has produced so far."""

    run: RunView
    rounds: tuple[RoundView, ...]
    participants: tuple[ParticipantView, ...]
    traffic: BytesByPhase  # of all participants


class Event(Message):
    """Something that happened in a run, for those who watch it."""

    seq: Count
    at: float
    kind: Text
    data: dict[str, Any]


class JoinRequest(Message):
    """A device asks to take part. Its data is described by counts, and a hash of its classes."""

    name: Text
    train_samples: Count
    test_samples: Count
    num_classes: Count
    classes_sha256: Sha256 | None = None  # of the classes' names in order; None: it has no data


class JoinResponse(Message):
    """The credential stands for the participant in every later request."""

    participant: Text
    credential: Text
    run: RunView


class Assignment(Message):
    """What to do next, and with which global state."""

    task: Task
    round: Count
    attempt: Count = 0
    state: BlobRef
    remaining_s: Seconds | None = None  # until the round lets stragglers go
    status: RunStatus
    reason: str | None = None
    head: BlobRef | None = None  # where it changes during the run (distillation.every)

    @model_serializer(mode="wrap")
    def _without_a_head_that_never_changes(
        self, handler: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.head is None:
            values.pop("head", None)
        return values


class UpdateMeta(Message):
    """Beside the tensors of an update: what they were trained on."""

    round: Count
    attempt: Count
    samples: Count  # kept samples, the weight of the update
    base: Sha256 | None = None  # the state that the tensors are changes of; None: whole ones
    session: StepId | None = None  # whose prompts on the server belong to the update
    train_loss: Loss | None = None
    local_loss: Loss | None = None


class UpdateReceipt(Message):
    """The server's word that an update is on its disk and counts once."""

    round: Count
    samples: Count


class EvaluationReport(Message):
    """One participant's measurement of a global state on its held-out samples."""

    round: Count
    attempt: Count
    samples: Count
    correct: Count
    loss_sum: float

    @model_validator(mode="after")
    def _no_more_correct_than_seen(self) -> EvaluationReport:
        if self.correct > self.samples:
            raise ValueError(f"correct ({self.correct}) is above samples ({self.samples})")
        return self


class StepMeta(Message):
    """The meta part of a frame of the split plane. ``step`` is its idempotency key."""

    step: StepId
    round: Count


class BodyStepMeta(Message):
    """The meta part of forward and backward where the body is tuned: a session's steps, in order.

    A session is one participant's split training in one round, with a body of its own on the
    server. Its steps are numbered from 0; each is one forward and then one backward.
    """

    session: StepId
    round: Count
    attempt: Count
    number: Count
    steps: Annotated[int, Field(ge=1, lt=2**31)]

    @model_validator(mode="after")
    def _within_the_session(self) -> BodyStepMeta:
        if self.number >= self.steps:
            raise ValueError(f"number ({self.number}) is not below steps ({self.steps})")
        return self


class InferMeta(StepMeta):
    """The meta part of an inference. With ``state``, only that global state may answer."""

    state: Sha256 | None = None


class ExchangeMeta(Message):
    """The meta part of an exchange: a session's requests, in order, each sent until answered.

    A session is one participant's split training in one round, with its prompts on the server.
    Request ``number`` brings the gradients of batch ``number - 1`` and asks for the features of
    batch ``number``; the first one brings none, the last one, ``number == steps``, asks for none.
    """

    session: StepId
    round: Count
    attempt: Count
    number: Count
    steps: Annotated[int, Field(ge=1, lt=2**31)]

    @model_validator(mode="after")
    def _within_the_session(self) -> ExchangeMeta:
        if self.number > self.steps:
            raise ValueError(f"number ({self.number}) is above steps ({self.steps})")
        return self


class SamplesMeta(Message):
    """The meta part of frames that speak of samples the server keeps."""


M = TypeVar("M", bound=Message)


def parse_message(kind: type[M], raw: object) -> M:
    """Validate a message from the other end.

    Raises:
        InvalidField: with the path, the limit and the value of the first field that is wrong.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        value = first.get("input")
        raise InvalidField(
            f"{kind.__name__}: {first['msg']}",
            field=".".join(str(part) for part in first["loc"]) or extract_field(first),
            limit=extract_limit(first),
            value=value if isinstance(value, (str, int, float)) else None,
        ) from None
