"""Server and devices as forked processes that follow a control page, and their supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sfprompt_bench.chaos.control import ControlPage, follow_page, follow_page_in_server
from sfprompt_bench.chaos.disk import enter

# A process of its own spends seconds on imports, more than a whole run takes. These fork from one
# that has imported everything.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["split_server.app", "edge_client.participant", "sklearn.datasets"])

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl

Line = Callable[[dict[str, Any]], None]


class ChaosProcess:
    """``python -m MODULE ARGUMENTS`` under the supervision of a run.

    Args:
        name: for people; the log is ``NAME.log``.
        module: has the command's `main`.
        arguments: of the command.
        folder: of the log and the control page; not on a disk that is filled.
        on_event: called with each line of JSON that it prints.
        namespace: the process whose namespaces it enters; None: it stays in this one's.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        on_event: Line = lambda _event: None,
        namespace: int | None = None,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.page = ControlPage(folder / f"{name}.control")
        self.starts = 0
        self._page_path = folder / f"{name}.control"
        self._words = [module, *arguments]
        self._on_event = on_event
        self._namespace = namespace
        self._child: Any = None  # a process of the fork server; None: before the first start
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        self.page.disarm()
        receiver, sender = _FORKS.Pipe(duplex=False)
        arguments = (self._words, str(self._page_path), self._namespace, sender)
        child = _FORKS.Process(target=_run, args=arguments, daemon=True)
        child.start()
        self._child = child  # from here on it can be signalled
        sender.close()
        self.starts += 1
        self._reader = threading.Thread(target=self._read, args=(receiver,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return int(self._child.pid)

    def exit_code(self) -> int | None:
        """The exit code; negative: the signal that ended it; None: it runs, or was not started."""
        code: int | None = None if self._child is None else self._child.exitcode
        return code

    @property
    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self.exit_code() is None

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        self.signal(signal.SIGKILL)

    def limit_files(self, size: int | None) -> None:
        """Let it write no file beyond this size in bytes; None: no limit."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(
                    self.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard)
                )

    def wait(self, seconds: float) -> int | None:
        """Wait at most so long for its end and the end of its output; return the exit code."""
        self._child.join(seconds)
        if self.exit_code() is not None and self._reader is not None:
            self._reader.join(5)
        return self.exit_code()

    def last_lines(self, count: int = 15) -> str:
        """Read the end of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def _read(self, receiver: Connection) -> None:
        # A pipe, for a file would be subject to the limit of `limit_files`.
        with (
            os.fdopen(os.dup(receiver.fileno()), errors="replace") as lines,
            self.log.open("a") as log,
        ):
            receiver.close()
            for line in lines:
                log.write(line)
                log.flush()
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict):
                        self._on_event(event)


def _run(words: list[str], page_path: str, namespace: int | None, output: Connection) -> None:
    """The child: follow the page, and run the command."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: end with the fork server
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    gc.freeze()  # else a collection copies the pages shared with the fork server
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    page = ControlPage(Path(page_path))
    if namespace is not None:
        enter(namespace)
    follow_page(page)
    if words[0].startswith("split_server"):
        follow_page_in_server(page)
    sys.argv = words
    importlib.import_module(words[0]).main()


class Supervisor:
    """Starts a process again after each end but success, as systemd does.

    Args:
        process: to supervise; `poll` starts it.
        pause_s: between an end and the next start.
        max_starts: then `poll` gives up.
        on_end: called with the exit code before each further start.
    """

    def __init__(
        self,
        process: ChaosProcess,
        pause_s: float,
        max_starts: int,
        on_end: Callable[[ChaosProcess, int], None],
    ) -> None:
        self.process = process
        self.done = False
        self.gave_up = False
        self._pause_s = pause_s
        self._max_starts = max_starts
        self._on_end = on_end
        self._ended_at: float | None = None

    def poll(self) -> None:
        """Notice an end, and start the process again when its pause is over."""
        if self.done or self.gave_up:
            return
        code = self.process.exit_code()
        if code is None:
            return
        now = time.monotonic()
        if self._ended_at is None:
            self.process.wait(0)
            if code == 0:
                self.done = True
                return
            self._ended_at = now
            self._on_end(self.process, code)
            self.gave_up = self.process.starts >= self._max_starts
        elif now >= self._ended_at + self._pause_s:
            self._ended_at = None
            self.process.start()
