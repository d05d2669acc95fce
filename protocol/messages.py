"""JSON messages of the federation plane, and meta parts of the split plane's frames."""

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
from protocol.nearest import nearest_field
from protocol.parts import Text
from protocol.plan import RunPlan
from protocol.quality import PredictionCounts
from protocol.settings import RunSettings

__all__ = [
    "MAX_LOSS",
    "SAMPLE_ID_BYTES",
    "Absence",
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
    "StartMeta",
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

SAMPLE_ID_BYTES = 16  # id of a sample in the server's cache

MAX_LOSS = 1e9  # loss of one sample, in nats; a larger loss means that the model has diverged

Loss = Annotated[float, Field(ge=0, le=MAX_LOSS)]

BytesByPhase = dict[str, dict[str, int]]


class RunStatus(StrEnum):
    """The state of a run."""

    WAITING = "waiting"  # waits for its first participants
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in (RunStatus.FINISHED, RunStatus.CANCELLED, RunStatus.FAILED)


class RoundStatus(StrEnum):
    """The state of one attempt at a round."""

    TRAINING = "training"  # the server accepts updates
    EVALUATING = "evaluating"  # participants evaluate the new global state
    CLOSED = "closed"
    REPEATED = "repeated"  # too few updates: the same round was opened again


class Task(StrEnum):
    """The next task of a participant."""

    UPLOAD = "upload"  # send samples and labels; only in a run with shared labels
    TRAIN = "train"
    EVALUATE = "evaluate"
    WAIT = "wait"
    STOP = "stop"


class BlobRef(Message):
    """Reference to a file of the server, by the hash of its content."""

    sha256: Sha256
    nbytes: Count


class RunView(Message):
    """The public view of a run."""

    id: Text
    status: RunStatus
    reason: str | None = None  # reason of a failure or cancellation
    settings: RunSettings  # as the operator wrote them
    plan: RunPlan  # what server and devices execute
    paused: bool = False  # by the operator: no further round opens
    round: Count  # the open round or the last one; 0 before the first
    participants: Count
    created_at: float  # seconds since 1970
    finished_at: float | None = None
    backbone_bytes: Count  # size of the uncut model with its classifier, in float32
    head: BlobRef
    state: BlobRef  # the newest global state


class RoundView(Message):
    """The record of one attempt at a round."""

    round: Count
    attempt: Count
    status: RoundStatus
    opened_at: float
    closed_at: float | None = None
    sampled: tuple[str, ...]  # participants selected to train
    updated: tuple[str, ...] = ()  # participants whose update was counted
    refused: tuple[str, ...] = ()  # participants whose update was refused
    samples: Count = 0  # selected samples of all counted updates
    train_loss: float | None = None  # mean over the selected samples in split training
    local_loss: float | None = None  # mean over the samples in the local-loss update
    accuracy: float | None = None  # accuracy of the new global state on held-out samples
    evaluation_loss: float | None = None
    evaluation_samples: Count = 0
    epsilon: float | None = None  # privacy budget spent so far; None: without noise
    kept: bool = True  # False: the state was worse than the best one, and was discarded
    traffic: BytesByPhase = {}
    state: BlobRef | None = None  # the round's global state


class ParticipantView(Message):
    """The operator's view of a participant."""

    id: Text
    name: Text
    train_samples: Count
    test_samples: Count
    joined_at: float
    left_at: float | None = None
    traffic: BytesByPhase = {}


class Results(Message):
    """All results of a run so far."""

    run: RunView
    rounds: tuple[RoundView, ...]
    participants: tuple[ParticipantView, ...]
    traffic: BytesByPhase  # of all participants
    waiting: str | None = None  # for whom the run waits before it can go on; None: for nobody

    @property
    def best(self) -> RoundView | None:
        """The measured round whose state the run has: the last one that was kept."""
        closed = (view for view in reversed(self.rounds) if view.status == RoundStatus.CLOSED)
        return next((view for view in closed if view.kept and view.accuracy is not None), None)


class Event(Message):
    """One event of a run, for clients that follow it."""

    seq: Count
    at: float
    kind: Text
    data: dict[str, Any]


class JoinRequest(Message):
    """A device's request to join a run, with counts of its samples and a hash of its classes."""

    name: Text
    train_samples: Count
    test_samples: Count
    num_classes: Count
    classes_sha256: Sha256 | None = None  # hash of the ordered class names; None: no data
    shares_labels: bool = False  # whether its owner lets the server have its labels


class JoinResponse(Message):
    """The response to a join request; the credential authenticates all later requests."""

    participant: Text
    credential: Text
    run: RunView


class Assignment(Message):
    """A participant's next task, and the global state for it."""

    task: Task
    round: Count
    attempt: Count = 0
    state: BlobRef
    remaining_s: Seconds | None = None  # until the round closes without stragglers
    status: RunStatus
    reason: str | None = None
    head: BlobRef | None = None  # only where the method rebuilds it during the run
    start: Count | None = None  # the attempt at round 0 that counted, in a run that has one
    rate_scale: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the learning rates in this round
    waiting: str | None = None  # for whom the run waits before it can go on; None: for nobody

    @model_serializer(mode="wrap")
    def _omit_missing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        missing_values = {"head": None, "start": None, "rate_scale": 1.0, "waiting": None}
        for name, missing in missing_values.items():
            if values.get(name) == missing:
                values.pop(name, None)
        return values


class Absence(Message):
    """A participant's notice that it ends; no round waits for it until its next request."""

    reason: Text


class UpdateMeta(Message):
    """The meta part of an update."""

    round: Count
    attempt: Count
    samples: Count  # selected samples: the weight of the update
    base: Sha256 | None = None  # state that the tensors are changes of; None: whole tensors
    session: StepId | None = None  # session that trained the update's part on the server
    train_loss: Loss | None = None
    local_loss: Loss | None = None


class UpdateReceipt(Message):
    """The server's confirmation that an update is on disk and counted."""

    round: Count
    samples: Count


class EvaluationReport(Message):
    """One participant's evaluation of a global state on its held-out samples."""

    round: Count
    attempt: Count
    samples: Count
    correct: Count
    loss_sum: float
    selection_loss: Loss | None = None  # by which the server selects a state; see SPEC, section 9
    selection_samples: Count = 0  # behind this mean
    predictions: PredictionCounts | None = None  # with training.report_classes

    @model_validator(mode="after")
    def _check_correct(self) -> EvaluationReport:
        if self.correct > self.samples:
            raise ValueError(f"correct ({self.correct}) is above samples ({self.samples})")
        counts = self.predictions
        if counts is not None and (counts.samples, counts.correct) != (self.samples, self.correct):
            raise ValueError("samples and correct differ from those of predictions")
        return self


class StepMeta(Message):
    """The meta part of forward and backward. ``step`` is the idempotency key."""

    step: StepId
    round: Count


class BodyStepMeta(Message):
    """The meta part of forward and backward with a tuned body: one step of a session.

    A session is one participant's split training in one attempt at a round, with its own body on
    the server. Its steps are numbered from 0; each is one forward and then one backward.
    """

    session: StepId
    round: Count
    attempt: Count
    number: Count
    steps: Annotated[int, Field(ge=1, lt=2**31)]

    @model_validator(mode="after")
    def _check_number(self) -> BodyStepMeta:
        if self.number >= self.steps:
            raise ValueError(f"number ({self.number}) is not below steps ({self.steps})")
        return self


class InferMeta(StepMeta):
    """The meta part of an inference. ``state``: hash of the required global state; None: any."""

    state: Sha256 | None = None


class ExchangeMeta(Message):
    """The meta part of an exchange: one request of a session.

    A session is one participant's split training in one attempt at a round, with its own prompts on
    the server. Request ``number`` carries the gradients of batch ``number - 1`` and requests the
    features of batch ``number``. The first request carries no gradients; the last one
    (``number == steps``) requests no features.
    """

    session: StepId
    round: Count
    attempt: Count
    number: Count
    steps: Annotated[int, Field(ge=1, lt=2**31)]

    @model_validator(mode="after")
    def _check_number(self) -> ExchangeMeta:
        if self.number > self.steps:
            raise ValueError(f"number ({self.number}) is above steps ({self.steps})")
        return self


class StartMeta(Message):
    """The meta part of requests of round 0.

    A device repeats a request until all participants have responded. A device that lacks its
    features, such as one that joined later, requests them in a later round.
    """

    round: Count = 0
    attempt: Count


class SamplesMeta(Message):
    """The empty meta part of frames with samples, sample ids or labels."""


M = TypeVar("M", bound=Message)


def parse_message(message_type: type[M], raw: object) -> M:
    """Validate a message from the other end.

    Raises:
        InvalidField: a field is wrong; the error has path, limit and value of the first one.
    """
    try:
        return message_type.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        value, path = first.get("input"), ".".join(str(part) for part in first["loc"])
        value = value if isinstance(value, (str, int, float)) else None
        if first["type"] == "extra_forbidden":
            meant = nearest_field(message_type, first["loc"], raw)
            raise InvalidField(
                f"{message_type.__name__}: there is no field {path}",
                field=path,
                value=value,
                hint=f"did you mean {meant}?" if meant else None,
            ) from None
        raise InvalidField(
            f"{message_type.__name__}: {first['msg']}",
            field=path or extract_field(first),
            limit=extract_limit(first),
            value=value,
        ) from None
