"""What the server remembers: the tables of its SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Connection, ForeignKey, ForeignKeyConstraint, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from protocol.errors import InvalidField
from protocol.messages import BlobRef
from split_server.storage.run_files import StateRefs

SCHEMA_VERSION = 5


class Base(DeclarativeBase):
    """All tables of `SCHEMA_VERSION`."""

    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON}


class RunRow(Base):
    """One federation."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    reason: Mapped[str | None]
    settings: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    backbone_path: Mapped[str]
    backbone_bytes: Mapped[int]
    renewed: Mapped[int]  # the round after which backbone and head were made; 0: with the run
    head_sha256: Mapped[str]
    head_nbytes: Mapped[int]
    state_sha256: Mapped[str]
    state_nbytes: Mapped[int]
    # What the server keeps of the state to itself: prompts, or a body.
    held_sha256: Mapped[str | None]
    held_nbytes: Mapped[int | None]

    def set_state(self, refs: StateRefs) -> None:
        """Make this the global state."""
        self.state_sha256, self.state_nbytes = refs.device.sha256, refs.device.nbytes
        held = refs.server
        self.held_sha256 = held.sha256 if held else None
        self.held_nbytes = held.nbytes if held else None

    @property
    def state(self) -> StateRefs:
        """The global state."""
        held = None
        if self.held_sha256 is not None and self.held_nbytes is not None:
            held = BlobRef(sha256=self.held_sha256, nbytes=self.held_nbytes)
        return StateRefs(BlobRef(sha256=self.state_sha256, nbytes=self.state_nbytes), held)


class ParticipantRow(Base):
    """One device in one run."""

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
    traffic: Mapped[dict[str, Any]]


class RoundRow(Base):
    """One attempt at one round."""

    __tablename__ = "rounds"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    opened_at: Mapped[float]
    closed_at: Mapped[float | None]
    sampled: Mapped[list[str]]
    declined: Mapped[list[str]]  # sampled, but had nothing that could be counted
    evaluators: Mapped[list[str]]
    samples: Mapped[int]
    train_loss: Mapped[float | None]
    local_loss: Mapped[float | None]
    accuracy: Mapped[float | None]
    evaluation_loss: Mapped[float | None]
    evaluation_samples: Mapped[int]
    state_sha256: Mapped[str | None]
    state_nbytes: Mapped[int | None]
    traffic: Mapped[dict[str, Any]]


class _OfRound:
    """Columns and key of what belongs to one participant in one attempt at one round."""

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


class UpdateRow(_OfRound, Base):
    """An update that counts. Its tensors lie in a file until the round is aggregated."""

    __tablename__ = "updates"
    __table_args__ = _round_and_participant()

    train_loss: Mapped[float | None]
    local_loss: Mapped[float | None]
    sha256: Mapped[str]


class EvaluationRow(_OfRound, Base):
    """One participant's measurement of the state that a round made."""

    __tablename__ = "evaluations"
    __table_args__ = _round_and_participant()

    correct: Mapped[int]
    loss_sum: Mapped[float]


class EventRow(Base):
    """Something that happened in a run."""

    __tablename__ = "events"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]]


class IdempotentResponseRow(Base):
    """The answer to a request that changed state, kept for a repeat of the same request."""

    __tablename__ = "answers"

    scope: Mapped[str] = mapped_column(primary_key=True)  # who asked, and for what
    key: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[str]  # SHA-256 of the request
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[float]


_BUSY_TIMEOUT_MS = 30_000


class Store:
    """Sessions on the server's database. Safe to use from many threads.

    Raises:
        InvalidField: the file was made by a release with another schema.
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
        """A transaction that holds the write lock from its beginning; commits at the end."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees one state of the database and changes nothing."""
        with Session(self._engine) as session:
            yield session

    def close(self) -> None:
        self._writer.dispose()
        self._engine.dispose()

    def _check_schema(self, path: Path) -> None:
        with self._writer.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            empty = not connection.exec_driver_sql("SELECT name FROM sqlite_master").all()
            if found == 0 and empty:
                Base.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif found != SCHEMA_VERSION:
                raise InvalidField(
                    f"{path} was written by a release with another schema",
                    field="data_dir",
                    limit=SCHEMA_VERSION,
                    value=found,
                    hint="use that release, or another data_dir",
                )


def _set_up_connection(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself
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
