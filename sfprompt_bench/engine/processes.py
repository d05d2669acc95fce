"""A process that does one task after the other: a line of JSON in, a line of JSON out.

What is measured must not share an interpreter with what measures it. A worker is held on its cores
and waits between two tasks, so that others can be measured in turn with it.
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

import psutil

from edge_client.transport import Server
from protocol.errors import SFPromptError
from protocol.messages import JoinRequest, Task
from protocol.plan import RunPlan
from sfprompt_bench.run.preflight import choose_port
from sfprompt_bench.run.processes import Process, wait_until_healthy
from split_server.client import OperatorClient, read_token
from tuning_methods.custom.settings import Custom


@dataclass(frozen=True)
class Cores:
    """A machine's cores, divided.

    Attributes:
        server: of the server, and of the loop that it is measured against.
        clients: of all devices together; the server's own where there is no other.
        pinned: whether processes can be held on their cores here.
    """

    server: tuple[int, ...]
    clients: tuple[int, ...]
    pinned: bool = True

    @property
    def shared(self) -> bool:
        """Whether clients take time from the server."""
        return not self.pinned or bool(set(self.server) & set(self.clients))

    @property
    def threads(self) -> int:
        """CPU threads of the body, and of the loop."""
        return len(self.server)


def divide_cores() -> Cores:
    """The cores that this process may use: a quarter for the clients, one at least."""
    if not hasattr(os, "sched_getaffinity"):
        every = tuple(range(os.cpu_count() or 1))
        return _divided(every, pinned=False)
    return _divided(sorted(os.sched_getaffinity(0)), pinned=True)


def _divided(every: Sequence[int], *, pinned: bool) -> Cores:
    if len(every) == 1:
        return Cores(tuple(every), tuple(every), pinned)
    clients = max(1, len(every) // 4)
    return Cores(tuple(every[:-clients]), tuple(every[-clients:]), pinned)


@contextmanager
def held_on(cores: Sequence[int]) -> Iterator[None]:
    """Whatever is started within, thread or process, stays on these cores."""
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
    """The owner's end.

    Args:
        name: what people call it; its log is ``NAME.log``.
        module: which calls `serve_tasks`.
        folder: of the log.
        cores: on which it stays.
        threads: CPU threads that its libraries may use.
    """

    def __init__(
        self, name: str, module: str, folder: Path, cores: Sequence[int], threads: int
    ) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log, held_on(cores):
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

    def ask(self, task: str, **what: Any) -> dict[str, Any]:
        """Have a task done.

        Raises:
            SFPromptError: it failed, or the worker ended; with what it said.
        """
        self.begin(task, **what)
        return self.end()

    def begin(self, task: str, **what: Any) -> None:
        """Have a task begun; `end` takes its result."""
        if self._child.stdin is None:
            raise SFPromptError(f"{self.name} takes no tasks")
        try:
            self._child.stdin.write(json.dumps({"task": task, "what": what}) + "\n")
            self._child.stdin.flush()
        except OSError:
            raise self._ended() from None

    def is_done(self, wait_s: float) -> bool:
        """Whether the task that was begun is done within so many seconds."""
        answers = self._child.stdout
        return answers is None or bool(select.select([answers], [], [], wait_s)[0])

    def end(self) -> dict[str, Any]:
        """The result of the task that was begun.

        Raises:
            SFPromptError: as in `ask`.
        """
        line = self._child.stdout.readline() if self._child.stdout else ""
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SFPromptError(f"{self.name}: {answer['error']}", field=str(self._log))
        result: dict[str, Any] = answer["result"]
        return result

    def stop(self) -> None:
        """End it; what it is doing is lost."""
        self._child.terminate()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def _ended(self) -> SFPromptError:
        lines = self._log.read_text(errors="replace").splitlines()
        return SFPromptError(f"{self.name} ended early:\n" + "\n".join(lines[-15:]))


def serve_tasks(tasks: Mapping[str, BenchTask]) -> None:
    """The worker's end: do what is asked, by the tasks' names, until nobody asks any more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed goes to the log
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": tasks[asked["task"]](**asked["what"])}
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


HOST = "127.0.0.1"

_START_S = 120.0

_SAMPLES = 1_000_000  # that each participant claims to have


@dataclass(frozen=True)
class OpenRun:
    """A run whose round is open for everybody who has joined."""

    settings: RunPlan
    credentials: tuple[str, ...]
    round: int


class ServerProcess:
    """A server that answers."""

    def __init__(self, process: Process, port: int, data_dir: Path) -> None:
        self.port = port
        self.data_dir = data_dir
        self._process = psutil.Process(process.pid)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def cpu_s(self) -> float:
        """CPU seconds of the server so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def resident_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def open_run(self, settings: RunPlan) -> OpenRun:
        """Create a run and join it until its first round opens.

        Raises:
            SFPromptError: the server refuses the run, or the round does not open.
        """
        operator = OperatorClient(self.url, read_token(self.data_dir))
        device = Server(self.url)
        try:
            run = operator.create_run(Custom.of(settings)).id
            joined = []
            for number in range(1, settings.federation.min_participants + 1):
                request = JoinRequest(
                    name=f"device-{number}",
                    train_samples=_SAMPLES,
                    test_samples=0,
                    num_classes=settings.model.num_classes,
                )
                joined.append(device.join(run, request, f"join-{number}").credential)
            device.authenticate(joined[-1])
            assignment = device.assignment(run, None, 0.0)
            if assignment.task != Task.TRAIN:
                raise SFPromptError(f"the round did not open: {assignment.task}")
            return OpenRun(settings, tuple(joined), assignment.round)
        finally:
            operator.close()
            device.close()


@contextmanager
def hosted(
    name: str, folder: Path, cores: Cores, settings: Mapping[str, object]
) -> Iterator[ServerProcess]:
    """A server on its own cores, with settings of its own, until the end of the block.

    Raises:
        SFPromptError: it does not start; with the end of its log.
    """
    port, data_dir = choose_port(0), folder / name
    values = {
        "host": HOST,
        "port": port,
        "data_dir": str(data_dir),
        "torch_threads": cores.threads,
        **settings,
    }
    config = folder / f"{name}.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    with held_on(cores.server):
        arguments = ["split_server.cli", "serve", "--config", str(config)]
        process = Process(name, arguments, folder, threads=cores.threads)
    try:
        probe = OperatorClient(f"http://{HOST}:{port}")
        try:
            wait_until_healthy(process, probe.is_healthy, _START_S)
        finally:
            probe.close()
        yield ServerProcess(process, port, data_dir)
    finally:
        process.stop()
