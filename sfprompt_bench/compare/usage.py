"""Memory and processor time of a run's processes, measured from outside."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

_INTERVAL_S = 0.2

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


@dataclass
class Usage:
    """What one process has used so far."""

    peak_bytes: int = 0  # of resident memory, libraries included
    cpu_seconds: float = 0.0  # user and system


class UsageWatch:
    """Measures the server and the devices of one run, children of this process, while it is open.

    It recognises them by the run's folder in their arguments. The last measurement of a process is
    at most `_INTERVAL_S` before its end. On Linux the peak of memory comes from the kernel;
    elsewhere it is the maximum of the measurements.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._usages: dict[str, Usage] = {}
        self._closed = threading.Event()
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
        self._closed.set()
        self._thread.join()

    def server(self) -> Usage:
        return self._usages.get("server", Usage())

    def devices(self) -> list[Usage]:
        return [usage for name, usage in sorted(self._usages.items()) if name != "server"]

    def _watch(self) -> None:
        this_process = psutil.Process()
        while not self._closed.wait(_INTERVAL_S):
            for child in this_process.children():
                with contextlib.suppress(psutil.Error, OSError):
                    self._measure(child)

    def _measure(self, child: psutil.Process) -> None:
        command = child.cmdline()
        name = _process_name(command)
        prefix = f"{self._folder}{os.sep}"
        if name is None or not any(word.startswith(prefix) for word in command):
            return
        usage = self._usages.setdefault(name, Usage())
        usage.peak_bytes = max(usage.peak_bytes, _peak_bytes(child))
        times = child.cpu_times()
        usage.cpu_seconds = max(usage.cpu_seconds, times.user + times.system)


def _process_name(command: list[str]) -> str | None:
    """``server``, or the name of a device; None for other processes."""
    if "split_server.cli" in command:
        return "server"
    if "edge_client.cli" in command and "--name" in command[:-1]:
        return command[command.index("--name") + 1]
    return None


def _peak_bytes(child: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        match = _PEAK.search(Path(f"/proc/{child.pid}/status").read_text())
        if match:
            return int(match.group(1)) * 1024
    return int(child.memory_info().rss)
