"""Server and devices as child processes, with their logs in the run folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from protocol.errors import SFPromptError

DeviceEvent = Callable[[str, dict[str, Any]], None]  # called with the device's name and its event


_started: weakref.WeakSet[Process] = weakref.WeakSet()


class Process:
    """A child process with a log.

    Args:
        name: for people; the log is ``NAME.log``.
        arguments: of ``python -m``.
        folder: of the log.
        on_line: called with each line of its standard output; None: the lines go to the log.
        threads: maximum CPU threads of its libraries; None: no limit.
        cwd: working directory; None: this process's.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        folder: Path,
        on_line: Callable[[str], None] | None = None,
        threads: int | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if on_line else log,
                stderr=log,
                env=environment,
                cwd=cwd,
            )
        _started.add(self)
        self._reader: threading.Thread | None = None
        if on_line is not None:
            self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
            self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        if self._child.stdout is None:
            return
        with self._child.stdout as lines:
            for line in lines:
                on_line(line.decode(errors="replace").rstrip("\n"))

    @property
    def pid(self) -> int:
        return self._child.pid

    def exit_code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._child.poll()

    def wait(self, seconds: float) -> int:
        """Wait for the exit code; raise `subprocess.TimeoutExpired` after ``seconds``."""
        code = self._child.wait(seconds)
        self._finish_reading()
        return code

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        self._child.kill()
        self._child.wait()
        self._finish_reading()

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        if self._child.poll() is None:
            self._child.terminate()

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, and kill it after ``seconds``."""
        self.terminate()
        if self._child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
        if self._child.poll() is None:
            self.kill()
        self._finish_reading()

    def _finish_reading(self) -> None:
        if self._reader is not None:
            self._reader.join(5)

    def last_lines(self, count: int = 15) -> str:
        """Read the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-count:])


def end_processes() -> None:
    """Ask all processes that this one has started to end; their waiters return."""
    for process in list(_started):
        process.terminate()


def usable_cores() -> int:
    """Count the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_device(
    name: str,
    arguments: Sequence[str],
    folder: Path,
    on_event: DeviceEvent,
    threads: int | None = None,
) -> Process:
    """Start an edge client that reports its progress in lines of JSON."""

    def on_line(line: str) -> None:
        try:
            data = json.loads(line)
        except ValueError:
            return
        if isinstance(data, dict):
            on_event(name, data)

    arguments = ["edge_client.cli", *arguments, "--name", name, "--progress", "json"]
    return Process(name, arguments, folder, on_line, threads)


def wait_until_healthy(server: Process, probe: Callable[[], bool], seconds: float) -> None:
    """Wait until the server answers.

    Raises:
        SFPromptError: it ended, or did not answer within ``seconds``; with the end of its log.
    """
    deadline = time.monotonic() + seconds
    while not probe():
        if server.exit_code() is not None or time.monotonic() > deadline:
            state = "ended" if server.exit_code() is not None else "does not answer"
            raise SFPromptError(
                f"the server {state}:\n{server.last_lines()}", field=str(server.log)
            )
        time.sleep(0.1)
