"""Files of the server, kept on the device under the hash of their content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from protocol.errors import MalformedFrame
from protocol.messages import BlobRef

_KEPT_STATES = 4  # newest global states that stay on the disk

_GRACE_S = 600.0  # a file used so recently may be another process's

Download = Callable[[int], bytes | bytearray | memoryview]


class BlobCache:
    """A folder of files named by their SHA-256. What is there is never downloaded again.

    Processes may share it: a file is downloaded by one of them while the others wait for it.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, ref: BlobRef, download: Download) -> Path:
        """The file's path. ``download(start)`` gives the next bytes from ``start`` on, not all.

        A download that broke off goes on where it stopped, also after a restart of the process
        or in another one. A file that was damaged on the disk is downloaded again.

        Raises:
            MalformedFrame: what came is not what hash and size say.
        """
        path = self._folder / f"{ref.sha256}.safetensors"
        if _is(path, ref):
            with contextlib.suppress(FileNotFoundError):  # else another process has just dropped it
                os.utime(path)
                return path
        part = self._folder / f"{ref.sha256}.part"
        with _held(part) as file:
            if _is(path, ref):  # made by another process in the meantime
                part.unlink()
                return path
            resumed = file.seek(0, os.SEEK_END) > 0
            found = _complete(file, ref, download)
            if found != ref and resumed:
                file.truncate(0)  # what lay there was damaged: once more from the start
                found = _complete(file, ref, download)
            if found != ref:
                part.unlink()
                raise MalformedFrame(
                    "a downloaded file is not the one that was announced",
                    field="sha256",
                    limit=_named(ref),
                    value=_named(found),
                    hint="try again; if it stays so, the server's files are damaged",
                )
            os.fsync(file.fileno())
            part.replace(path)
        return path

    def drop_old(
        self, keep: set[str], newest: int = _KEPT_STATES, unused_s: float = _GRACE_S
    ) -> None:
        """Delete all files but those named, the ``newest`` used last, and those in recent use.

        Args:
            keep: SHA-256 of files that stay; they count as used now.
            newest: how many others stay at least.
            unused_s: seconds without use after which a file may go.
        """
        for sha256 in keep:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._folder / f"{sha256}.safetensors")
        oldest_in_use = time.time() - unused_s
        others = [used for used in self._by_use("*.safetensors") if used[1].stem not in keep]
        for when, file in others[: max(0, len(others) - newest)]:
            if when <= oldest_in_use:
                file.unlink(missing_ok=True)
        for when, part in self._by_use("*.part"):
            if when <= oldest_in_use and part.stem not in keep:
                _drop_unless_held(part)

    def _by_use(self, pattern: str) -> list[tuple[float, Path]]:
        """Time of last use and path of each file, the longest unused first."""
        found = []
        for file in self._folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                found.append((file.stat().st_mtime, file))
        return sorted(found)


def _is(path: Path, ref: BlobRef) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == ref.nbytes and _sha256(file) == ref.sha256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _held(part: Path) -> Iterator[BinaryIO]:
    """The part file, open for appending and locked; the system unlocks it if the process dies."""
    while True:
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, part):  # else: finished or removed by its holder while this one waited
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _complete(file: BinaryIO, ref: BlobRef, download: Download) -> BlobRef:
    """Append what is missing, each piece as it comes. Returns what there is then."""
    size = file.seek(0, os.SEEK_END)
    while size < ref.nbytes:
        piece = download(size)
        if not piece:
            break
        file.write(piece)
        file.flush()
        size += len(piece)
    return BlobRef(sha256=_sha256(file), nbytes=size)


def _named(ref: BlobRef) -> str:
    return f"{ref.sha256} of {ref.nbytes} bytes"


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _drop_unless_held(part: Path) -> None:
    with contextlib.suppress(FileNotFoundError, BlockingIOError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
