"""Files of the server, cached on the device under the hash of their content."""

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

_MAX_OTHER_FILES = 4  # the most recently used files that stay on disk, such as global states

_GRACE_S = 600.0  # another process may still use a file that was used so recently

Download = Callable[[int], bytes | bytearray | memoryview]


class BlobCache:
    """A folder of files named by their SHA-256. A complete file is not downloaded again.

    Processes may share it: one downloads a file while the others wait for it.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: dict[
            str, float
        ] = {}  # SHA-256 of downloads, and when this object used them last
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, ref: BlobRef, download: Download) -> Path:
        """Return the path of a file, downloaded unless it is complete.

        An interrupted download continues where it stopped, also in another process. A damaged
        file is downloaded again.

        Args:
            ref: the file's hash and size.
            download: ``download(start)`` returns the next bytes from ``start`` on, not all.

        Raises:
            MalformedFrame: the download does not match hash and size.
        """
        path = self._folder / f"{ref.sha256}.safetensors"
        if _matches(path, ref):
            with contextlib.suppress(FileNotFoundError):  # else another process has deleted it
                self._use(path)
                return path
        part = self._folder / f"{ref.sha256}.part"
        with _locked(part) as file:
            if _matches(path, ref):  # another process has completed it
                part.unlink()
                return path
            received = _append_rest(file, ref, download)
            if received != ref:
                file.truncate(0)  # a part was damaged, on the way or on the disk: start again
                received = _append_rest(file, ref, download)
            if received != ref:
                part.unlink()
                raise MalformedFrame(
                    "a downloaded file does not match its announced hash and size",
                    field="sha256",
                    limit=_describe(ref),
                    value=_describe(received),
                    hint="try again; if it fails again, the server's files are damaged",
                )
            os.fsync(file.fileno())
            part.replace(path)
            self._own[ref.sha256] = path.stat().st_mtime
        return path

    def drop_old(
        self, keep: set[str], newest: int = _MAX_OTHER_FILES, unused_s: float = _GRACE_S
    ) -> None:
        """Delete all files but those in ``keep``, the most recently used, and those in use.

        A file that this object has downloaded, and that nobody has used since, counts as unused at
        once: a server that sends a new file every second does not fill the disk.

        Args:
            keep: SHA-256 of files that stay; they count as used now.
            newest: number of other files that stay, the most recently used.
            unused_s: seconds without use after which a file may be deleted.
        """
        for sha256 in keep:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._folder / f"{sha256}.safetensors")
        unused_since = time.time() - unused_s
        others = [entry for entry in self._by_use("*.safetensors") if entry[1].stem not in keep]
        for used_at, file in others[: max(0, len(others) - newest)]:
            if used_at <= unused_since or self._own.get(file.stem) == used_at:
                file.unlink(missing_ok=True)
                self._own.pop(file.stem, None)
        for used_at, part in self._by_use("*.part"):
            if used_at <= unused_since and part.stem not in keep:
                _delete_unless_locked(part)

    def _use(self, path: Path) -> None:
        """Make a file the most recently used; it stays this object's if nobody else used it."""
        is_own = self._own.get(path.stem) == path.stat().st_mtime
        os.utime(path)
        if is_own:
            self._own[path.stem] = path.stat().st_mtime

    def _by_use(self, pattern: str) -> list[tuple[float, Path]]:
        """Return time of last use and path of each file, the least recently used first."""
        files = []
        for file in self._folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                files.append((file.stat().st_mtime, file))
        return sorted(files)


def _matches(path: Path, ref: BlobRef) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == ref.nbytes and _sha256(file) == ref.sha256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open the part file for appending, locked; the system unlocks it if the process dies."""
    while True:
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, part):  # else another process renamed or deleted it meanwhile
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _append_rest(file: BinaryIO, ref: BlobRef, download: Download) -> BlobRef:
    """Append the missing bytes, piece by piece, and return the file's hash and size."""
    size = file.seek(0, os.SEEK_END)
    while size < ref.nbytes:
        piece = download(size)
        if not piece:
            break
        file.write(piece)
        file.flush()
        size += len(piece)
    return BlobRef(sha256=_sha256(file), nbytes=size)


def _describe(ref: BlobRef) -> str:
    return f"{ref.sha256} of {ref.nbytes} bytes"


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _delete_unless_locked(part: Path) -> None:
    with contextlib.suppress(FileNotFoundError, BlockingIOError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
