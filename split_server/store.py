"""The SQLite file: transactions that are on disk when they end."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from protocol.errors import InvalidField
from split_server.tables import SCHEMA_VERSION, Base

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
