"""Write the result of a request to the database, in the transaction of the caller.

Each function adds the rows, the event in the run's history, and the response to a repetition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete
from sqlalchemy.orm import Session

from protocol.errors import SFPromptError
from protocol.messages import EvaluationReport, JoinRequest, RoundStatus, RunStatus, UpdateMeta
from protocol.settings import RunSettings
from split_server.federation.snapshot import OpenRound, RunSnapshot
from split_server.models.prepare import PreparedRun
from split_server.storage.database import (
    EvaluationRow,
    EventRow,
    IdempotentResponseRow,
    ParticipantRow,
    RoundRow,
    RunRow,
    UpdateRow,
)
from split_server.storage.events import IdempotentRequest, record_event

REFUSED = "update_refused"  # kind of the event


def add_run(
    session: Session,
    run_id: str,
    settings: RunSettings,
    prepared: PreparedRun,
    backbone_path: str,
    at: float,
) -> None:
    """Add a run that waits for participants.

    Args:
        session: the transaction.
        run_id: id of the run.
        settings: settings of the run.
        prepared: model files of the run.
        backbone_path: path of the backbone, relative to the data folder if it is in it.
        at: time in seconds since 1970.
    """
    row = RunRow(
        id=run_id,
        status=RunStatus.WAITING,
        reason=None,
        settings=settings.model_dump(mode="json"),
        created_at=at,
        finished_at=None,
        backbone_path=backbone_path,
        backbone_bytes=prepared.backbone_bytes,
        renewed=0,
        body_tuned=False,
        paused=False,
        best=None,
        head_sha256=prepared.head.sha256,
        head_nbytes=prepared.head.nbytes,
    )
    row.set_state(prepared.state)
    session.add(row)
    record_event(session, run_id, at, "run_created", name=settings.name)


def add_participant(
    session: Session,
    run: RunSnapshot,
    request: JoinRequest,
    idempotent: IdempotentRequest,
    at: float,
) -> str:
    """Add a participant to a run and return its id."""
    ordinal = len(run.participants) + 1
    participant_id = f"p{ordinal:04d}"
    session.add(
        ParticipantRow(
            run_id=run.id,
            id=participant_id,
            ordinal=ordinal,
            name=request.name,
            train_samples=request.train_samples,
            test_samples=request.test_samples,
            classes_sha256=request.classes_sha256,
            joined_at=at,
            left_at=None,
            removed=False,
            labelled=False,
            traffic={},
        )
    )
    idempotent.remember(session, {"participant": participant_id}, at)
    record_event(
        session, run.id, at, "participant_joined", participant=participant_id, name=request.name
    )
    return participant_id


def record_leaving(
    session: Session, run_id: str, participant_id: str, idempotent: IdempotentRequest, at: float
) -> None:
    """Record that a participant has left."""
    row = session.get_one(ParticipantRow, (run_id, participant_id))
    row.left_at, row.labelled = at, False
    idempotent.remember(session, {}, at)
    record_event(session, run_id, at, "participant_left", participant=participant_id)


def record_removal(
    session: Session,
    run: RunSnapshot,
    participant_id: str,
    idempotent: IdempotentRequest,
    at: float,
) -> None:
    """Record that the operator removed a participant; its update of an open round is void."""
    row = session.get_one(ParticipantRow, (run.id, participant_id))
    row.removed, row.left_at, row.labelled = True, row.left_at or at, False
    if run.open_round is not None and run.open_round.status == RoundStatus.TRAINING:
        key = (run.id, run.open_round.round, run.open_round.attempt, participant_id)
        if (update := session.get(UpdateRow, key)) is not None:
            session.delete(update)
    idempotent.remember(session, {}, at)
    record_event(
        session, run.id, at, "participant_removed", participant=participant_id, name=row.name
    )


def record_labels(
    session: Session, run_id: str, participant_id: str, samples: int, at: float
) -> None:
    """Record that the server has a participant's labels, which are on disk."""
    session.get_one(ParticipantRow, (run_id, participant_id)).labelled = True
    data = {"participant": participant_id, "samples": samples}
    record_event(session, run_id, at, "labels_received", **data)


def record_labels_lost(
    session: Session, run_id: str, participant_id: str, reason: str, at: float
) -> None:
    """Record that the server needs a participant's samples and labels again."""
    session.get_one(ParticipantRow, (run_id, participant_id)).labelled = False
    data = {"participant": participant_id, "reason": reason}
    record_event(session, run_id, at, "labels_needed", **data)


def record_tuning(
    session: Session, run_id: str, weights: str | None, figures: Mapping[str, float], at: float
) -> None:
    """Record that the body was tuned before round 0.

    Args:
        session: the transaction.
        run_id: id of the run.
        weights: the new weights, relative to the data folder; None: they were not better.
        figures: of both bodies.
        at: time in seconds since 1970.
    """
    row = session.get_one(RunRow, run_id)
    row.body_tuned = True
    if weights is not None:
        row.backbone_path = weights
    record_event(session, run_id, at, "body_tuned", kept=weights is not None, **figures)


def delete_run(session: Session, run_id: str) -> None:
    """Delete all rows of a run."""
    for table in (EvaluationRow, UpdateRow, RoundRow, EventRow, ParticipantRow):
        session.execute(delete(table).where(table.run_id == run_id))
    of_run = IdempotentResponseRow.scope.startswith(f"{run_id}/", autoescape=True)
    session.execute(delete(IdempotentResponseRow).where(of_run))
    session.execute(delete(RunRow).where(RunRow.id == run_id))


def record_end(session: Session, run_id: str, participant_id: str, reason: str, at: float) -> None:
    """Record that a participant's process has ended, and why."""
    data = {"participant": participant_id, "reason": reason}
    record_event(session, run_id, at, "participant_ended", **data)


def count_update(
    session: Session,
    run_id: str,
    participant_id: str,
    meta: UpdateMeta,
    sha256: str,
    idempotent: IdempotentRequest,
    at: float,
) -> None:
    """Count an update; ``sha256``: hash of the file with its tensors."""
    session.add(
        UpdateRow(
            run_id=run_id,
            round=meta.round,
            attempt=meta.attempt,
            participant_id=participant_id,
            samples=meta.samples,
            received_at=at,
            train_loss=meta.train_loss,
            local_loss=meta.local_loss,
            sha256=sha256,
        )
    )
    idempotent.remember(session, {}, at)
    data = meta.model_dump(exclude={"local_loss", "session", "base"})
    record_event(session, run_id, at, "update_counted", participant=participant_id, **data)


def decline_update(
    session: Session,
    run_id: str,
    open_round: OpenRound,
    participant_id: str,
    error: SFPromptError,
    at: float,
) -> None:
    """Record that the update of a participant was refused; the round does not wait for it."""
    row = session.get_one(RoundRow, (run_id, open_round.round, open_round.attempt))
    row.declined = [*row.declined, participant_id]
    record_event(
        session,
        run_id,
        at,
        REFUSED,
        round=row.round,
        attempt=row.attempt,
        participant=participant_id,
        code=error.code,
    )


def count_evaluation(
    session: Session,
    run_id: str,
    participant_id: str,
    report: EvaluationReport,
    idempotent: IdempotentRequest,
    at: float,
) -> None:
    """Count an evaluation."""
    session.add(
        EvaluationRow(
            run_id=run_id,
            participant_id=participant_id,
            received_at=at,
            **report.model_dump(exclude={"predictions"}),
            predictions=report.predictions and report.predictions.model_dump(mode="json"),
        )
    )
    idempotent.remember(session, {}, at)
    hidden = {"loss_sum", "selection_samples", "predictions"}
    data: dict[str, Any] = report.model_dump(exclude=hidden)
    if report.selection_loss is None:
        data.pop("selection_loss")
    record_event(session, run_id, at, "evaluation_counted", participant=participant_id, **data)
