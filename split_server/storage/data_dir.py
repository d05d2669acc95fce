"""The data folder: its lock, and its runs' folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import InvalidField, NotFound
from split_server.storage.run_ids import is_run_id

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def lock_data_dir(path: Path) -> Iterator[None]:
    """Lock the data folder against other servers while the block runs.

    The system releases the lock when the process ends, however it ends.

    Raises:
        InvalidField: another server uses the folder, or it cannot be created or opened.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # another user's folder, which this one may use
            path.chmod(0o700)  # also a folder of an earlier release
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InvalidField(
            "the data folder cannot be created or opened", field="data_dir", value=str(error)
        ) from error
    try:
        if fcntl is not None:
            _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def database_in(path: Path) -> Path:
    """Return the database in a data folder.

    Raises:
        NotFound: there is none.
    """
    database = path / "server.sqlite"
    if not database.is_file():
        raise NotFound("this is not the data folder of a server", field="data_dir", value=str(path))
    return database


def run_folders(path: Path) -> list[Path]:
    """Return the folders of all runs, by their names; other folders are not the server's."""
    folder = path / "runs"
    return [run for run in folder.iterdir() if is_run_id(run.name)] if folder.is_dir() else []


def check_complete(path: Path, database: Path) -> None:
    """Check that a data folder with runs has its database; without it the runs would be removed.

    Raises:
        InvalidField: there are run folders and no database.
    """
    runs = run_folders(path)
    if runs and not database.exists():
        raise InvalidField(
            f"the data folder has {len(runs)} runs and no {database.name}",
            field="data_dir",
            value=str(path),
            hint=f"restore {database.name}, or move runs/ elsewhere",
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InvalidField(
            "another server uses this data folder",
            field="data_dir",
            value=str(path),
            hint="stop that server, or choose another --data-dir",
        ) from None
