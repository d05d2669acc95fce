"""Segment files: samples on disk, mapped into memory."""

from __future__ import annotations

import contextlib
import logging
import mmap
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_SUFFIX = ".samples"


@dataclass(frozen=True, eq=False)
class Segment:
    """A file, and its content mapped into memory.

    The content stays readable after the file has been removed.
    """

    path: Path
    data: memoryview


class SegmentFolder:
    """The segment files of one process, in a folder of their own.

    Args:
        folder: created if absent; segment files of an earlier process are removed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{_SUFFIX}"):
            path.unlink()
        self._folder = folder

    def write(self, samples: Iterable[bytes | memoryview]) -> Segment | None:
        """Write samples to a new segment, one after the other.

        Returns:
            The segment; None if the system has no space, file descriptor or memory mapping left.
        """
        path = self._folder / f"{secrets.token_hex(8)}{_SUFFIX}"
        try:
            with path.open("w+b") as file:
                file.writelines(samples)
                file.flush()
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            path.unlink(missing_ok=True)
            log.warning("samples could not be moved to disk and are dropped: %s", error)
            return None
        return Segment(path, data)

    def remove(self, segment: Segment) -> None:
        """Remove a segment's file."""
        segment.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder, unless it has other files."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()
