"""The server's folder: one server at a time."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import InvalidField

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

OPERATOR_TOKEN_FILE = "operator.token"  # noqa: S105 - a file name

_RUN_ID = re.compile("r[0-9a-f]{10}")


@contextlib.contextmanager
def lock_data_dir(path: Path) -> Iterator[None]:
    """Keep other servers out of ``path`` for as long as this one runs, however it ends.

    Raises:
        InvalidField: another server is using it, or it cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InvalidField(
            "the folder cannot be used", field="data_dir", value=str(error)
        ) from error
    try:
        if fcntl is not None:
            _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def new_run_id() -> str:
    """A name that no run has, and no folder of anybody else's."""
    return "r" + secrets.token_hex(5)


def run_folders(path: Path) -> list[Path]:
    """What a server has made for its runs; whatever else lies there is not the server's."""
    folder = path / "runs"
    return (
        [one for one in folder.iterdir() if _RUN_ID.fullmatch(one.name)] if folder.is_dir() else []
    )


def require_whole(path: Path, database: Path) -> None:
    """Refuse a folder that has runs and has lost what knows of them: they would be swept away.

    Raises:
        InvalidField: there are run folders and no database.
    """
    found = run_folders(path)
    if found and not database.exists():
        raise InvalidField(
            f"the folder has {len(found)} runs and no {database.name}",
            field="data_dir",
            value=str(path),
            hint=f"put {database.name} back beside them, or move its runs/ away",
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InvalidField(
            "another server is using this folder",
            field="data_dir",
            value=str(path),
            hint="stop it, or give this one another --data-dir",
        ) from None
