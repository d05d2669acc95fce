"""The cache folder of downloads, and unpacking of named files from a tar archive."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edge_client.data.errors import DataFormatError

_MAX_MEMBER_BYTES = 1024**3

CACHE_VARIABLE = "SFPROMPT_CACHE"


def read_members(archive: Path, inside: str, names: Sequence[str], target: Path) -> None:
    """Copy regular files from a tar archive.

    Paths, links, owners and modes in the archive are ignored. The target folder appears with all
    files or not at all.

    Args:
        archive: the tar file.
        inside: folder in the archive.
        names: names of the files in ``inside``.
        target: folder for the copies.

    Raises:
        DataFormatError: the archive is damaged, or a file is missing, too large or not regular.
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
        if target.is_dir():  # an incomplete folder already exists
            for name in names:
                os.replace(unpacked / name, target / name)
        else:
            os.replace(unpacked, target)


def _copy(tar: tarfile.TarFile, member: str, path: Path) -> None:
    entry = tar.getmember(member)
    source = tar.extractfile(entry) if entry.isreg() else None
    if source is None or entry.size > _MAX_MEMBER_BYTES:
        raise DataFormatError(
            f"{member} in the archive",
            limit=f"a regular file of at most {_MAX_MEMBER_BYTES} bytes",
            value=entry.size if entry.isreg() else "not a regular file",
        )
    with source, path.open("wb") as copy:
        shutil.copyfileobj(source, copy)


def cache_dir() -> Path:
    """Return the folder for downloads: $SFPROMPT_CACHE, or ~/.cache/sfprompt. It may not exist."""
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "sfprompt"
