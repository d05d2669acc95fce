"""Worker processes and their cores: one task after the other, a line of JSON in, a line out.

Measured code must not share an interpreter with the code that measures it. A worker is pinned to
its cores and idle between two tasks, so that others can be measured in turn with it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import SFPromptError


@dataclass(frozen=True)
class Cores:
    """A machine's cores, divided.

    Attributes:
        server: of the server, and of the loop that it is compared with.
        clients: of all clients together; the server's if there is only one core.
        pinned: whether processes can be pinned to their cores on this machine.
    """

    server: tuple[int, ...]
    clients: tuple[int, ...]
    pinned: bool = True

    @property
    def shared(self) -> bool:
        """Whether clients take processor time from the server."""
        return not self.pinned or bool(set(self.server) & set(self.clients))

    @property
    def threads(self) -> int:
        """CPU threads of the body, and of the loop."""
        return len(self.server)


def divide_cores() -> Cores:
    """Divide the cores of this process: a quarter, at least one, for the clients."""
    if not hasattr(os, "sched_getaffinity"):
        return divide(range(os.cpu_count() or 1), pinned=False)
    return divide(sorted(os.sched_getaffinity(0)), pinned=True)


def divide(cores: Sequence[int], *, pinned: bool) -> Cores:
    """Divide some cores; a single one is shared."""
    if len(cores) == 1:
        return Cores(tuple(cores), tuple(cores), pinned)
    clients = max(1, len(cores) // 4)
    return Cores(tuple(cores[:-clients]), tuple(cores[-clients:]), pinned)


@contextmanager
def pinned_to(cores: Sequence[int]) -> Iterator[None]:
    """Pin the threads and processes that start in the block to these cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


BenchTask = Callable[..., dict[str, Any]]


class Worker:
    """The owner's end of a worker process.

    Args:
        name: for people; the log is ``NAME.log``.
        module: calls `serve_tasks`.
        folder: of the log.
        cores: to which it is pinned.
        threads: maximum CPU threads of its libraries.
    """

    def __init__(
        self, name: str, module: str, folder: Path, cores: Sequence[int], threads: int
    ) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log, pinned_to(cores):
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def perform(self, task: str, **arguments: Any) -> dict[str, Any]:
        """Perform a task and return its result.

        Raises:
            SFPromptError: it failed, or the worker ended; with the worker's error message.
        """
        self.begin(task, **arguments)
        return self.end()

    def begin(self, task: str, **arguments: Any) -> None:
        """Begin a task; `end` returns its result."""
        if self._child.stdin is None:
            raise SFPromptError(f"{self.name} has no input for tasks")
        try:
            request = {"task": task, "arguments": arguments}
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except OSError:
            raise self._ended_error() from None

    def is_done(self, wait_s: float) -> bool:
        """Wait at most ``wait_s`` seconds for the current task; whether it is done."""
        responses = self._child.stdout
        return responses is None or bool(select.select([responses], [], [], wait_s)[0])

    def end(self) -> dict[str, Any]:
        """Wait for the current task and return its result. Raises as `perform` does."""
        line = self._child.stdout.readline() if self._child.stdout else ""
        if not line:
            raise self._ended_error()
        response: dict[str, Any] = json.loads(line)
        if "error" in response:
            raise SFPromptError(f"{self.name}: {response['error']}", field=str(self._log))
        result: dict[str, Any] = response["result"]
        return result

    def stop(self) -> None:
        """End the process; a current task has no result."""
        self._child.terminate()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def _ended_error(self) -> SFPromptError:
        lines = self._log.read_text(errors="replace").splitlines()
        return SFPromptError(f"{self.name} ended early:\n" + "\n".join(lines[-15:]))


def serve_tasks(tasks: Mapping[str, BenchTask]) -> None:
    """The worker's end: perform tasks by name until its input ends."""
    responses, sys.stdout = sys.stdout, sys.stderr  # other output goes to the log
    for line in sys.stdin:
        request = json.loads(line)
        try:
            response: dict[str, Any] = {"result": tasks[request["task"]](**request["arguments"])}
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            response = {"error": f"{type(error).__name__}: {error}"}
        responses.write(json.dumps(response) + "\n")
        responses.flush()
