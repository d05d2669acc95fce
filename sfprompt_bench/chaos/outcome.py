"""The outcome of a run, from the server's database; it must be the same with and without faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from protocol.messages import RoundStatus
from split_server.storage.data_dir import database_in
from split_server.storage.database import (
    EventRow,
    ParticipantRow,
    RoundRow,
    RunRow,
    Store,
    UpdateRow,
)

_EVALUATION = ("accuracy", "evaluated")


@dataclass(frozen=True)
class RoundOutcome:
    """A closed round.

    Attributes:
        states: number of states made in the round; must be 1.
        counted: samples of each update in the state, by device.
        received: updates of the attempt in the database, by device.
        samples: of all counted updates.
        train_loss: mean over the updates.
        accuracy: of the new state; None: not measured.
        evaluated: samples of the evaluation.
        state: SHA-256 of the device's part of the new state.
    """

    round: int
    states: int
    counted: tuple[tuple[str, int], ...]
    received: tuple[tuple[str, int], ...]
    samples: int
    train_loss: float | None
    accuracy: float | None
    evaluated: int
    state: str | None


@dataclass(frozen=True)
class Outcome:
    """A run's end.

    Attributes:
        status: of the run.
        devices: names, in the order of joining.
        tail: SHA-256 of the device's part of the final state: the tail, in the paper's form with
            the prompts.
        prompts: SHA-256 of the server's part; None: there is none.
        rounds: all closed ones.
        repeated: attempts without a result.
    """

    status: str
    devices: tuple[str, ...]
    tail: str
    prompts: str | None
    rounds: tuple[RoundOutcome, ...]
    repeated: int = 0

    def differences(self, reference: Outcome, *, evaluated: bool = True) -> list[str]:
        """Say in what this outcome differs from that of an undisturbed run.

        Repeated attempts do not count as differences: the result is that of the last one.

        Args:
            reference: of the undisturbed run.
            evaluated: compare the evaluations, too.
        """
        found = [
            f"{name}: {getattr(self, name)} instead of {getattr(reference, name)}"
            for name in ("status", "devices", "tail", "prompts")
            if getattr(self, name) != getattr(reference, name)
        ]
        numbers = [row.round for row in self.rounds], [row.round for row in reference.rounds]
        if numbers[0] != numbers[1]:
            return [*found, f"rounds: {numbers[0]} instead of {numbers[1]}"]
        for own, other in zip(self.rounds, reference.rounds, strict=True):
            found += [
                f"round {own.round}, {name}: {getattr(own, name)} instead of {getattr(other, name)}"
                for name in RoundOutcome.__dataclass_fields__
                if (evaluated or name not in _EVALUATION)
                and getattr(own, name) != getattr(other, name)
            ]
        return found


def read_outcome(data_dir: Path, run: str) -> Outcome:
    """Read a run's outcome; the server may be dead.

    Raises:
        NotFound: the folder has no database.
    """
    store = Store(database_in(data_dir))
    try:
        with store.reading() as session:
            return _read(session, run)
    finally:
        store.close()


def _read(session: Session, run: str) -> Outcome:
    row = session.get_one(RunRow, run)
    rows = session.scalars(select(ParticipantRow).where(ParticipantRow.run_id == run))
    names = {each.id: each.name for each in sorted(rows, key=lambda each: each.ordinal)}
    events = list(session.scalars(select(EventRow).where(EventRow.run_id == run)))
    made: Counter[int] = Counter()
    counted: Counter[tuple[int, int, str, int]] = Counter()
    for event in events:
        data = event.data
        if event.kind == "state_aggregated":
            made[data["round"]] += 1
        elif event.kind == "update_counted":
            key = (data["round"], data["attempt"], names[data["participant"]], data["samples"])
            counted[key] += 1
    rounds = list(session.scalars(select(RoundRow).where(RoundRow.run_id == run)))
    closed = [each for each in rounds if each.status == RoundStatus.CLOSED]
    return Outcome(
        status=str(row.status),
        devices=tuple(names.values()),
        tail=row.state_sha256,
        prompts=row.server_sha256,
        rounds=tuple(
            _round(session, each, made[each.round], counted, names)
            for each in sorted(closed, key=lambda each: (each.round, each.attempt))
        ),
        repeated=len(rounds) - len(closed),
    )


def _round(
    session: Session,
    row: RoundRow,
    states: int,
    counted: Counter[tuple[int, int, str, int]],
    names: dict[str, str],
) -> RoundOutcome:
    updates = session.scalars(
        select(UpdateRow).where(
            UpdateRow.run_id == row.run_id,
            UpdateRow.round == row.round,
            UpdateRow.attempt == row.attempt,
        )
    )
    in_attempt = [
        (name, samples)
        for (round_, attempt, name, samples), times in counted.items()
        if (round_, attempt) == (row.round, row.attempt)
        for _ in range(times)
    ]
    return RoundOutcome(
        round=row.round,
        states=states,
        counted=tuple(sorted(in_attempt)),
        received=tuple(sorted((names[each.participant_id], each.samples) for each in updates)),
        samples=row.samples,
        train_loss=row.train_loss,
        accuracy=row.accuracy,
        evaluated=row.evaluation_samples,
        state=row.state_sha256,
    )
