"""Convert rows and snapshots into the protocol's messages."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from protocol.messages import (
    BlobRef,
    Event,
    ParticipantView,
    Results,
    RoundStatus,
    RoundView,
    RunView,
)
from protocol.traffic import Traffic
from split_server.federation.privacy_budget import spent
from split_server.federation.records import REFUSED
from split_server.federation.snapshot import RunSnapshot
from split_server.storage.database import EventRow, ParticipantRow, RoundRow, UpdateRow
from split_server.storage.traffic import Meter

_MAX_EVENTS = 500  # events in one response


def run_view(run: RunSnapshot) -> RunView:
    """Return the public view of a run."""
    return RunView(
        id=run.id,
        status=run.status,
        reason=run.reason,
        settings=run.settings,
        plan=run.plan,
        paused=run.paused,
        round=run.round,
        participants=len(run.present),
        created_at=run.created_at,
        finished_at=run.finished_at,
        backbone_bytes=run.backbone_bytes,
        head=run.head,
        state=run.state.device,
    )


def results(session: Session, run: RunSnapshot, meter: Meter, waiting: str | None) -> Results:
    """Return a run's rounds, participants and traffic so far, and for whom it waits."""
    rows = session.scalars(
        select(RoundRow).where(RoundRow.run_id == run.id).order_by(RoundRow.round, RoundRow.attempt)
    ).all()
    total = meter.run(run.id)
    return Results(
        run=run_view(run),
        rounds=_rounds(session, run, rows, total),
        participants=_participants(session, run, meter),
        traffic=total.to_dict(),
        waiting=waiting,
    )


def closed_traffic(session: Session, run_id: str) -> Traffic:
    """Return the sum of the traffic of all closed rounds."""
    traffic = Traffic()
    for counts in session.scalars(select(RoundRow.traffic).where(RoundRow.run_id == run_id)):
        traffic.merge(Traffic.from_dict(counts))
    return traffic


def _rounds(
    session: Session, run: RunSnapshot, rows: Sequence[RoundRow], total: Traffic
) -> tuple[RoundView, ...]:
    updated: dict[tuple[int, int], set[str]] = {}
    for round_, attempt, participant in session.execute(
        select(UpdateRow.round, UpdateRow.attempt, UpdateRow.participant_id).where(
            UpdateRow.run_id == run.id
        )
    ):
        updated.setdefault((round_, attempt), set()).add(participant)
    refused: dict[tuple[int, int], set[str]] = {}
    for data in session.scalars(
        select(EventRow.data).where(EventRow.run_id == run.id, EventRow.kind == REFUSED)
    ):
        refused.setdefault((data["round"], data["attempt"]), set()).add(data["participant"])
    earlier = Traffic()
    for row in rows:
        earlier.merge(Traffic.from_dict(row.traffic))
    epsilons = spent(session, run.id)
    views = []
    for row in rows:
        is_open = row.closed_at is None
        traffic = total.since(earlier).to_dict() if is_open else row.traffic
        key = row.round, row.attempt
        not_counted = frozenset(refused.get(key, set()))
        senders = run.in_order(frozenset(updated.get(key, set())) - not_counted)
        view = _round(row, tuple(senders), traffic, epsilons.get(key))
        views.append(view.model_copy(update={"refused": tuple(run.in_order(not_counted))}))
    return tuple(views)


def _round(
    row: RoundRow,
    updated: tuple[str, ...],
    traffic: dict[str, dict[str, int]],
    epsilon: float | None,
) -> RoundView:
    state = None
    if row.state_sha256 is not None and row.state_nbytes is not None:
        state = BlobRef(sha256=row.state_sha256, nbytes=row.state_nbytes)
    return RoundView(
        round=row.round,
        attempt=row.attempt,
        status=RoundStatus(row.status),
        opened_at=row.opened_at,
        closed_at=row.closed_at,
        sampled=tuple(row.sampled),
        updated=updated,
        samples=row.samples,
        train_loss=row.train_loss,
        local_loss=row.local_loss,
        accuracy=row.accuracy,
        evaluation_loss=row.evaluation_loss,
        evaluation_samples=row.evaluation_samples,
        epsilon=epsilon,
        kept=row.kept,
        traffic=traffic,
        state=state,
    )


def _participants(session: Session, run: RunSnapshot, meter: Meter) -> tuple[ParticipantView, ...]:
    rows = session.scalars(
        select(ParticipantRow)
        .where(ParticipantRow.run_id == run.id)
        .order_by(ParticipantRow.ordinal)
    )
    return tuple(
        ParticipantView(
            id=row.id,
            name=row.name,
            train_samples=row.train_samples,
            test_samples=row.test_samples,
            joined_at=row.joined_at,
            left_at=row.left_at,
            traffic=meter.participant(run.id, row.id).to_dict(),
        )
        for row in rows
    )


def events(session: Session, run_id: str, after: int) -> list[Event]:
    """Return a run's events after the one with this number."""
    rows = session.scalars(
        select(EventRow)
        .where(EventRow.run_id == run_id, EventRow.seq > after)
        .order_by(EventRow.seq)
        .limit(_MAX_EVENTS)
    )
    return [Event(seq=row.seq, at=row.at, kind=row.kind, data=row.data) for row in rows]
