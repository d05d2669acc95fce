"""Who this device is to a run, remembered so that a restart is not a second participant."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import IO

from protocol.errors import Conflict


class Identity:
    """The key of a device's joining, by server, run and device name.

    A device that joins again with the same key gets the same participant and credential. The file
    is locked as long as the process lives, so that two processes are never one participant.

    Args:
        folder: where keys are kept, readable by this user alone.

    Raises:
        Conflict: another process takes part under this name.
    """

    def __init__(self, folder: Path, url: str, run: str, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest = hashlib.sha256("\n".join((url, run, name)).encode()).hexdigest()[:24]
        path = folder / f"{digest}.json"
        self._file: IO[str] = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Conflict(
                "another process on this device already takes part under this name",
                field="name",
                value=name,
                hint="give each its own --name",
            ) from None
        text = self._file.read()
        if text:
            self.key: str = json.loads(text)["key"]
        else:
            self.key = uuid.uuid4().hex
            json.dump({"url": url, "run": run, "name": name, "key": self.key}, self._file)
            self._file.flush()
            os.fsync(self._file.fileno())

    def release(self) -> None:
        self._file.close()
