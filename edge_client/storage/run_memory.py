"""What a device keeps of a run across a restart, so that it continues as if it had not stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge_client.storage.states import Floats, State
from split_model.files import write_durably

_KEPT_S = 30 * 24 * 3600.0  # since the last use; a device that was away for longer starts anew

_ENTRY = "sfprompt"  # in the file's metadata: everything but the tensors, as JSON


@dataclass(frozen=True)
class Residuals:
    """What the codec of updates has lost, around the last update.

    Attributes:
        base: SHA-256 of the state that the update changed; None: there was no update.
        before: residuals by tensor that were added to the update.
        after: residuals that the update left.
    """

    base: str | None = None
    before: Mapping[str, Floats] = field(default_factory=dict)
    after: Mapping[str, Floats] = field(default_factory=dict)


class RunMemory:
    """One participant's memory of one run, in one small file that is replaced atomically.

    A file that cannot be read is ignored: the device continues like one that joined after round 0.
    Files of runs to which the device has not returned for 30 days are deleted.

    Args:
        folder: for the files of all runs, readable by this user only.
        run: the run's id.
        participant: the id that the server gave this device.

    Attributes:
        start: attempt at round 0, and the decay that this device computed in it; None: none yet.
        residuals: of the last update.
    """

    def __init__(self, folder: Path, run: str, participant: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = hashlib.sha256(f"{run}\n{participant}".encode()).hexdigest()[:24]
        self._path = folder / f"{name}.safetensors"
        self.start: tuple[int, float] | None = None
        self.residuals = Residuals()
        for unfinished in folder.glob(f".{self._path.name}.*.tmp"):
            unfinished.unlink(missing_ok=True)
        with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
            self._read()
            os.utime(self._path)
        _sweep(folder)

    def keep_start(self, attempt: int, decay: float) -> None:
        """Keep the decay computed in an attempt at round 0; it is durable on return."""
        if self.start != (attempt, decay):
            self.start = attempt, decay
            self._write()

    def keep_residuals(self, residuals: Residuals) -> None:
        """Keep what an update leaves; it is durable on return."""
        self.residuals = residuals
        self._write()

    def forget(self) -> None:
        """Remove the file: the run is over for this device."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        sides = {"before": self.residuals.before, "after": self.residuals.after}
        tensors = {
            f"{side}/{name}": np.ascontiguousarray(array)
            for side, by_name in sides.items()
            for name, array in by_name.items()
            if np.any(array)
        }
        entry = {"start": self.start, "base": self.residuals.base}
        content = save(tensors, metadata={_ENTRY: json.dumps(entry)})
        write_durably(self._path, content, mode=0o600)

    def _read(self) -> None:
        with safe_open(self._path, framework="numpy") as file:
            entry = json.loads((file.metadata() or {})[_ENTRY])
            sides: dict[str, State] = {"before": {}, "after": {}}
            for key in list(file.keys()):
                side, _, name = key.partition("/")
                sides[side][name] = file.get_tensor(key)
        start = entry["start"]
        self.start = None if start is None else (int(start[0]), float(start[1]))
        self.residuals = Residuals(entry["base"], sides["before"], sides["after"])


def _sweep(folder: Path) -> None:
    """Delete what nobody has used for long, unfinished files included."""
    unused_since = time.time() - _KEPT_S
    for pattern in ("*.safetensors", ".*.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if path.stat().st_mtime < unused_since:
                    path.unlink()
