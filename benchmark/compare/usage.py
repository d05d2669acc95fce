"""What the processes of a run take of the machine, watched from outside."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

_EVERY_S = 0.2
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


@dataclass
class Usage:
    """Of one process, so far."""

    peak_bytes: int = 0  # of resident memory, libraries included
    cpu_seconds: float = 0.0  # user and system


class UsageWatch:
    """Watches the server and the devices of one run, children of this process, while it is open.

    They are known by the run's folder, which every one of them is told.

    The last look at a process is at most `_EVERY_S` before its end. On Linux the peak of memory
    is the kernel's; elsewhere it is the largest that was seen.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._seen: dict[str, Usage] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> UsageWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def server(self) -> Usage:
        return self._seen.get("server", Usage())

    def devices(self) -> list[Usage]:
        return [usage for name, usage in sorted(self._seen.items()) if name != "server"]

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(_EVERY_S):
            for child in own.children():
                with contextlib.suppress(psutil.Error, OSError):
                    self._look(child)

    def _look(self, child: psutil.Process) -> None:
        command = child.cmdline()
        name = _name(command)
        if name is None or not any(word.startswith(f"{self._folder}{os.sep}") for word in command):
            return
        usage = self._seen.setdefault(name, Usage())
        usage.peak_bytes = max(usage.peak_bytes, _peak_bytes(child))
        times = child.cpu_times()
        usage.cpu_seconds = max(usage.cpu_seconds, times.user + times.system)


def _name(command: list[str]) -> str | None:
    """``server``, or the name of a device; None for a process that is neither."""
    if "split_server.cli" in command:
        return "server"
    if "edge_client.cli" in command and "--name" in command[:-1]:
        return command[command.index("--name") + 1]
    return None


def _peak_bytes(child: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        found = _PEAK.search(Path(f"/proc/{child.pid}/status").read_text())
        if found:
            return int(found.group(1)) * 1024
    return int(child.memory_info().rss)
