"""The server's folder: one server at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import InvalidField

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[None]:
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
