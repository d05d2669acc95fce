"""Immutable snapshots of runs after their last committed change, read without a lock."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from protocol.errors import NotFound
from protocol.messages import BlobRef, RoundStatus, RunStatus
from protocol.plan import RunPlan
from protocol.settings import RunSettings
from split_server.method import ServerMethod, server_method
from split_server.models.body_key import BodyKey
from split_server.storage.database import (
    BestState,
    EvaluationRow,
    EventRow,
    ParticipantRow,
    RoundRow,
    RunRow,
    UpdateRow,
)
from split_server.storage.run_files import RunFiles, StateRefs

_RATE_CUT = 0.5  # of the learning rates, for each state that was discarded

_LEAST_RATE_SCALE = 2.0**-20

REPEATED = "round_repeated"  # kind of the event


@dataclass(frozen=True)
class Participant:
    """A participant of a run."""

    id: str
    name: str
    ordinal: int
    train_samples: int
    test_samples: int
    left: bool  # of its own accord, or removed
    classes_sha256: str | None = None
    removed: bool = False  # by the operator
    labelled: bool = False  # the server has its samples and labels, and does its tasks

    @property
    def order(self) -> tuple[str, int]:
        """Sort key by name, so that results do not depend on the order of joining."""
        return self.name, self.ordinal


@dataclass(frozen=True)
class OpenRound:
    """The open attempt at a round. All participants are ids."""

    round: int
    attempt: int
    status: RoundStatus  # training or evaluating
    sampled: tuple[str, ...]
    updated: frozenset[str]
    declined: frozenset[str]
    evaluators: tuple[str, ...]
    evaluated: frozenset[str]
    closing: bool = False  # the operator closes the phase without those that are missing

    @property
    def key(self) -> tuple[int, int, RoundStatus]:
        """Key of the phase; each phase has its own deadline."""
        return self.round, self.attempt, self.status


@dataclass(frozen=True)
class RunSnapshot:
    """A run as the federation and the split plane see it."""

    id: str
    status: RunStatus
    reason: str | None
    settings: RunSettings
    created_at: float
    finished_at: float | None
    backbone_path: str
    backbone_bytes: int
    head: BlobRef
    state: StateRefs  # the newest global state
    participants: Mapping[str, Participant]  # by id, including those that have left
    open_round: OpenRound | None
    closed_rounds: int  # rounds that have produced a global state
    repeats: int  # attempts without a result at the round after these
    failures: int = 0  # those of them in which participants answered
    start_attempt: int | None = None  # at round 0, whose result the run uses; None: none yet
    renewed: int = 0  # the round after which weights and head were made again; 0: never
    best: BestState | None = None  # the best measured state; None: none was measured
    discarded: int = 0  # rounds whose state was worse than the best one
    body_tuned: bool = False  # or the attempt was made; only with `server_tuning`
    paused: bool = False  # by the operator: no further round opens
    deadline: float | None = None  # of the open phase, on the monotonic clock

    @property
    def plan(self) -> RunPlan:
        return self.settings.plan

    @cached_property
    def method(self) -> ServerMethod:
        return server_method(self.settings)

    @cached_property
    def body(self) -> BodyKey:
        """The key of the run's frozen body."""
        return BodyKey.of(self.backbone_path, self.plan)

    def basis_file(self, files: RunFiles) -> Path:
        """Return the path of the basis of the run's features.

        Raises:
            NotFound: round 0 has no result yet.
        """
        if self.start_attempt is None:
            raise NotFound("round 0 of the run has no result yet", field="round", value=0)
        return files.basis(self.start_attempt)

    @property
    def rate_scale(self) -> float:
        """The factor on the learning rates of the next or open round."""
        return max(_LEAST_RATE_SCALE, _RATE_CUT**self.discarded)

    @property
    def next_round(self) -> int:
        """The round after the closed ones."""
        return self.plan.first_round + self.closed_rounds

    @property
    def round(self) -> int:
        """The number of the open round, or else of the last one; 0 before the first."""
        if self.open_round is not None:
            return self.open_round.round
        return max(0, self.next_round - (0 if self.repeats else 1))

    @property
    def needs_rebuild(self) -> bool:
        """Whether the method must rebuild the run's model before the next round."""
        due = self.method.is_rebuild_due(self.plan, self.closed_rounds)
        return due and self.renewed < self.closed_rounds

    @property
    def present(self) -> list[Participant]:
        """The participants that have not left, sorted."""
        present = [each for each in self.participants.values() if not each.left]
        return sorted(present, key=lambda participant: participant.order)

    @property
    def labelled(self) -> frozenset[str]:
        """The ids of the participants whose tasks the server does."""
        return frozenset(each.id for each in self.present if each.labelled)

    @property
    def trainers(self) -> list[Participant]:
        """The present participants with training samples; with shared labels, those it has."""
        shares = self.plan.shares_labels
        return [each for each in self.present if each.train_samples and shares <= each.labelled]

    def drawable(self, live: Collection[str]) -> list[str]:
        """Return the ids of the live participants that can train, in order."""
        return [each.id for each in self.trainers if each.id in live]

    def in_order(self, participants: frozenset[str]) -> list[str]:
        """Sort participant ids in the order in which all sums are computed."""
        return sorted(participants, key=lambda id_: self.participants[id_].order)


@lru_cache(maxsize=256)
def _parsed(settings: str) -> RunSettings:
    """Parse the settings of a run. Cached, because a plan may need the shape of the backbone."""
    return RunSettings.model_validate_json(settings)


def load_snapshot(session: Session, run_id: str, data_dir: Path) -> RunSnapshot:
    """Read a run from the database; paths are relative to the server's data folder."""
    run = session.get_one(RunRow, run_id)
    last = session.scalars(
        select(RoundRow)
        .where(RoundRow.run_id == run_id)
        .order_by(RoundRow.round.desc(), RoundRow.attempt.desc())
        .limit(1)
    ).first()
    closed = session.scalar(
        select(func.count())
        .select_from(RoundRow)
        .where(RoundRow.run_id == run_id, RoundRow.status == RoundStatus.CLOSED)
    )
    settings = _parsed(json.dumps(run.settings, sort_keys=True))
    repeats = session.scalar(
        select(func.count())
        .select_from(RoundRow)
        .where(
            RoundRow.run_id == run_id,
            RoundRow.status == RoundStatus.REPEATED,
            RoundRow.round == settings.plan.first_round + (closed or 0),
        )
    )
    discarded = session.scalar(
        select(func.count())
        .select_from(RoundRow)
        .where(RoundRow.run_id == run_id, RoundRow.kept.is_(False))
    )
    start_attempt = session.scalar(
        select(RoundRow.attempt).where(
            RoundRow.run_id == run_id,
            RoundRow.round == 0,
            RoundRow.status.in_((RoundStatus.EVALUATING, RoundStatus.CLOSED)),
        )
    )
    return RunSnapshot(
        id=run.id,
        status=RunStatus(run.status),
        reason=run.reason,
        settings=settings,
        created_at=run.created_at,
        finished_at=run.finished_at,
        backbone_path=str(data_dir / run.backbone_path),
        backbone_bytes=run.backbone_bytes,
        head=BlobRef(sha256=run.head_sha256, nbytes=run.head_nbytes),
        state=run.state,
        participants=_load_participants(session, run_id),
        open_round=_load_open_round(session, last),
        closed_rounds=closed or 0,
        repeats=repeats or 0,
        failures=_count_failures(session, run_id, settings, closed or 0) if repeats else 0,
        start_attempt=start_attempt,
        renewed=run.renewed,
        body_tuned=run.body_tuned,
        best=run.best_state,
        discarded=discarded or 0,
        paused=run.paused,
    )


def _count_failures(session: Session, run_id: str, settings: RunSettings, closed: int) -> int:
    """Count the attempts at the next round that failed although participants answered."""
    events = session.scalars(
        select(EventRow.data).where(EventRow.run_id == run_id, EventRow.kind == REPEATED)
    )
    round_ = settings.plan.first_round + closed
    return sum(data["round"] == round_ and data.get("failure", True) for data in events)


def _load_participants(session: Session, run_id: str) -> dict[str, Participant]:
    rows = session.execute(
        select(
            ParticipantRow.id,
            ParticipantRow.name,
            ParticipantRow.ordinal,
            ParticipantRow.train_samples,
            ParticipantRow.test_samples,
            ParticipantRow.left_at,
            ParticipantRow.classes_sha256,
            ParticipantRow.removed,
            ParticipantRow.labelled,
        ).where(ParticipantRow.run_id == run_id)
    )
    return {
        row.id: Participant(
            row.id,
            row.name,
            row.ordinal,
            row.train_samples,
            row.test_samples,
            row.left_at is not None,
            row.classes_sha256,
            row.removed,
            row.labelled,
        )
        for row in rows
    }


def _load_open_round(session: Session, row: RoundRow | None) -> OpenRound | None:
    if row is None or row.status not in (RoundStatus.TRAINING, RoundStatus.EVALUATING):
        return None
    return OpenRound(
        round=row.round,
        attempt=row.attempt,
        status=RoundStatus(row.status),
        sampled=tuple(row.sampled),
        updated=_senders(session, UpdateRow, row),
        declined=frozenset(row.declined),
        evaluators=tuple(row.evaluators),
        evaluated=_senders(session, EvaluationRow, row),
        closing=row.closing,
    )


def _senders(
    session: Session, table: type[UpdateRow] | type[EvaluationRow], row: RoundRow
) -> frozenset[str]:
    """Return the participants whose update or evaluation of this attempt is stored."""
    return frozenset(
        session.scalars(
            select(table.participant_id).where(
                table.run_id == row.run_id,
                table.round == row.round,
                table.attempt == row.attempt,
            )
        )
    )
