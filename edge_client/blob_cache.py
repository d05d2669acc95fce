"""Files of the server, kept on the device under the hash of their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from protocol.errors import MalformedFrame
from protocol.messages import BlobRef

_KEPT_STATES = 4  # newest global states that stay on the disk


class BlobCache:
    """A folder of files named by their SHA-256. What is there is never downloaded again.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, ref: BlobRef, download: Callable[[int], bytes | bytearray]) -> Path:
        """The file's path; ``download(start)`` is called for the bytes that are missing.

        A download that broke off goes on where it stopped.

        Raises:
            MalformedFrame: what came is not what the hash says.
        """
        path = self._folder / f"{ref.sha256}.safetensors"
        if path.exists():
            path.touch()
            return path
        part = self._folder / f"{ref.sha256}.{os.getpid()}.part"
        start = part.stat().st_size if part.exists() else 0
        with part.open("ab") as file:
            file.write(download(start))
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        if digest != ref.sha256 or part.stat().st_size != ref.nbytes:
            part.unlink()
            raise MalformedFrame(
                "a downloaded file is not the one that was announced",
                field="sha256",
                limit=ref.sha256,
                value=digest,
                hint="try again; if it stays so, the server's files are damaged",
            )
        part.replace(path)
        return path

    def drop_old(self, keep: set[str], newest: int = _KEPT_STATES) -> None:
        """Delete all files but those named and the ``newest`` used last."""
        files = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for file in files[: max(0, len(files) - newest)]:
            if file.stem not in keep:
                file.unlink(missing_ok=True)
