"""The server's SQLite database: its tables, and sessions on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Connection, ForeignKey, ForeignKeyConstraint, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from protocol.base import Message
from protocol.errors import InvalidField
from protocol.messages import BlobRef
from split_server.storage.run_files import StateRefs

SCHEMA_VERSION = 11


class Base(DeclarativeBase):
    """All tables of `SCHEMA_VERSION`."""

    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON}


class BestState(Message):
    """The best measured state of a run, and the attempt at a round that produced it."""

    round: int
    attempt: int
    device: BlobRef
    server: BlobRef | None

    @property
    def refs(self) -> StateRefs:
        """Its files."""
        return StateRefs(self.device, self.server)


class RunRow(Base):
    """A run."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    reason: Mapped[str | None]
    settings: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    backbone_path: Mapped[str]
    backbone_bytes: Mapped[int]
    body_tuned: Mapped[bool]  # before round 0, whether or not it helped
    renewed: Mapped[int]  # round after which backbone and head were made; 0: with the run
    head_sha256: Mapped[str]
    head_nbytes: Mapped[int]
    state_sha256: Mapped[str]
    state_nbytes: Mapped[int]
    server_sha256: Mapped[str | None] = mapped_column("held_sha256")  # the server-side state
    server_nbytes: Mapped[int | None] = mapped_column("held_nbytes")
    paused: Mapped[bool]  # by the operator: no further round opens
    best: Mapped[dict[str, Any] | None]  # `BestState`; None: no state has been measured

    def set_state(self, refs: StateRefs) -> None:
        """Make this the run's global state."""
        self.state_sha256, self.state_nbytes = refs.device.sha256, refs.device.nbytes
        self.server_sha256 = refs.server.sha256 if refs.server else None
        self.server_nbytes = refs.server.nbytes if refs.server else None

    @property
    def state(self) -> StateRefs:
        """The run's global state."""
        server = None
        if self.server_sha256 is not None and self.server_nbytes is not None:
            server = BlobRef(sha256=self.server_sha256, nbytes=self.server_nbytes)
        return StateRefs(BlobRef(sha256=self.state_sha256, nbytes=self.state_nbytes), server)

    @property
    def best_state(self) -> BestState | None:
        """The best measured state."""
        return None if self.best is None else BestState.model_validate(self.best)


class ParticipantRow(Base):
    """A device in a run."""

    __tablename__ = "participants"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    ordinal: Mapped[int]  # in the order of joining, from 1
    name: Mapped[str]
    train_samples: Mapped[int]
    test_samples: Mapped[int]
    classes_sha256: Mapped[str | None]
    joined_at: Mapped[float]
    left_at: Mapped[float | None]
    removed: Mapped[bool]  # by the operator; left_at says when
    labelled: Mapped[bool]  # the server has its labels; only in runs with shared labels
    traffic: Mapped[dict[str, Any]]


class RoundRow(Base):
    """An attempt at a round."""

    __tablename__ = "rounds"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    opened_at: Mapped[float]
    closed_at: Mapped[float | None]
    closing: Mapped[bool]  # the operator closes the open phase without those that are missing
    sampled: Mapped[list[str]]
    declined: Mapped[list[str]]  # sampled, but without an update to count
    evaluators: Mapped[list[str]]
    samples: Mapped[int]
    train_loss: Mapped[float | None]
    local_loss: Mapped[float | None]
    accuracy: Mapped[float | None]
    evaluation_loss: Mapped[float | None]
    evaluation_samples: Mapped[int]
    change: Mapped[float | None]  # of the selection loss against the best state
    kept: Mapped[bool]  # whether the state replaced the best one
    progress: Mapped[bool]  # whether it is better by enough to go on
    state_sha256: Mapped[str | None]
    state_nbytes: Mapped[int | None]
    traffic: Mapped[dict[str, Any]]


class _RoundEntry:
    """Columns and key of a row that belongs to a participant and an attempt at a round."""

    run_id: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    participant_id: Mapped[str] = mapped_column(primary_key=True)
    samples: Mapped[int]
    received_at: Mapped[float]


def _round_and_participant() -> tuple[ForeignKeyConstraint, ForeignKeyConstraint]:
    return (
        ForeignKeyConstraint(
            ["run_id", "round", "attempt"], ["rounds.run_id", "rounds.round", "rounds.attempt"]
        ),
        ForeignKeyConstraint(
            ["run_id", "participant_id"], ["participants.run_id", "participants.id"]
        ),
    )


class UpdateRow(_RoundEntry, Base):
    """A counted update. Its tensors are in a file until the round is aggregated."""

    __tablename__ = "updates"
    __table_args__ = _round_and_participant()

    train_loss: Mapped[float | None]
    local_loss: Mapped[float | None]
    sha256: Mapped[str]


class EvaluationRow(_RoundEntry, Base):
    """A participant's evaluation of the state after a round."""

    __tablename__ = "evaluations"
    __table_args__ = _round_and_participant()

    correct: Mapped[int]
    loss_sum: Mapped[float]
    selection_loss: Mapped[float | None]
    selection_samples: Mapped[int]
    predictions: Mapped[dict[str, Any] | None]  # `PredictionCounts`


class EventRow(Base):
    """An event in a run."""

    __tablename__ = "events"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]]


class IdempotentResponseRow(Base):
    """The response to a request that changed state, for repeats of the same request."""

    __tablename__ = "answers"

    scope: Mapped[str] = mapped_column(primary_key=True)  # sender and operation
    key: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[str]  # SHA-256 of the request
    response: Mapped[dict[str, Any]] = mapped_column("answer")
    created_at: Mapped[float]


_BUSY_TIMEOUT_MS = 30_000


class Store:
    """Sessions on the server's database. Thread-safe.

    Raises:
        InvalidField: a release with another schema wrote the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        url = URL.create("sqlite+pysqlite", database=str(path))
        self._engine = create_engine(url, pool_size=16, max_overflow=32)
        event.listen(self._engine, "connect", _set_up_connection)
        event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        try:
            self._check_schema(path)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Open a transaction that has the write lock from its beginning; commit it at the end."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a read-only session on one consistent state of the database."""
        with Session(self._engine) as session:
            yield session

    def close(self) -> None:
        self._writer.dispose()
        self._engine.dispose()

    def _check_schema(self, path: Path) -> None:
        with self._writer.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            is_empty = not connection.exec_driver_sql("SELECT name FROM sqlite_master").all()
            if version == 0 and is_empty:
                Base.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise InvalidField(
                    f"{path} was written by a release with another schema",
                    field="data_dir",
                    limit=SCHEMA_VERSION,
                    value=version,
                    hint="use the release that wrote it, or another data_dir",
                )


def _set_up_connection(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver opens no transactions itself
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        f"busy_timeout = {_BUSY_TIMEOUT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options().get("sqlite_begin", "BEGIN")
    connection.exec_driver_sql(statement)
