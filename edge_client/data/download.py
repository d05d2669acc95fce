"""Named files out of a tar archive, and nothing else of it."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edge_client.data.errors import DataFormatError

_MOST_BYTES = 1024**3  # for one member


def read_members(archive: Path, inside: str, names: Sequence[str], target: Path) -> None:
    """Copy the plain files inside/name of a tar archive to target/name.

    No path, link, owner or mode of the archive is followed. target appears with all files or not
    at all. Raises DataFormatError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as folder:
        unpacked = Path(folder) / "files"
        unpacked.mkdir()
        try:
            with tarfile.open(archive) as tar:
                for name in names:
                    _copy(tar, f"{inside}/{name}", unpacked / name)
        except (tarfile.TarError, OSError, EOFError, KeyError) as error:
            raise DataFormatError(
                "archive",
                limit=f"a tar with {', '.join(names)} in {inside}/",
                value=str(archive),
                hint=str(error),
            ) from error
        if target.is_dir():  # an incomplete folder from before
            for name in names:
                os.replace(unpacked / name, target / name)
        else:
            os.replace(unpacked, target)


def _copy(tar: tarfile.TarFile, member: str, path: Path) -> None:
    entry = tar.getmember(member)
    source = tar.extractfile(entry) if entry.isreg() else None
    if source is None or entry.size > _MOST_BYTES:
        raise DataFormatError(
            f"{member} in the archive",
            limit=f"a plain file of at most {_MOST_BYTES} bytes",
            value=entry.size if entry.isreg() else "no plain file",
        )
    with source, path.open("wb") as copy:
        shutil.copyfileobj(source, copy)


CACHE_VARIABLE = "SFPROMPT_CACHE"


def cache_dir() -> Path:
    """The folder for what was downloaded: $SFPROMPT_CACHE, or ~/.cache/sfprompt. Not created."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "sfprompt"
