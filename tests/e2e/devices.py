"""Devices that take part in a whole run: as processes, or in threads of this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import torch

from edge_client.data.dataset import Dataset, by_content, limit_per_set
from edge_client.data.partition import Part
from edge_client.data.sources import load_dataset
from edge_client.participant import Participant, succeeded
from edge_client.transport.client import Server
from protocol.messages import Results
from protocol.plan import RunPlan
from split_server.client import OperatorClient
from tests.e2e.conftest import ServerProcess
from tests.support.processes import CommandProcess
from tests.support.reporters import ListReporter
from tuning_methods.custom.settings import Custom

TRAIN, TEST = 120, 40  # images of the digits, over all devices

TIMEOUT_S = 120


class Devices(Protocol):
    """Some devices of a run, named device-1, device-2, ..., with the events they reported."""

    events: dict[str, list[dict[str, Any]]]

    def wait(self) -> None: ...
    def stop(self) -> None: ...


class DeviceProcesses:
    """Edge clients as processes."""

    def __init__(self, server: ServerProcess, run: str, count: int, home: Path) -> None:
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.processes: dict[str, CommandProcess] = {}
        home.mkdir(exist_ok=True)
        for number in range(1, count + 1):
            name = f"device-{number}"
            self.events[name] = []
            arguments = ["join", server.url, "--run", run, "--data", "digits", "--threads", "1"]
            arguments += ["--limit-train", str(TRAIN), "--limit-test", str(TEST)]
            arguments += ["--part", f"{number}/{count}", "--home", str(home / name)]
            arguments += ["--name", name, "--progress", "json"]
            log = home / f"{name}.log"
            self.processes[name] = CommandProcess("edge_client.cli", arguments, log)

    def wait(self) -> None:
        for name, process in self.processes.items():
            assert process.wait(TIMEOUT_S) == 0, process.last_lines()
            self.events[name] = [json.loads(line) for line in process.lines()]

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()


class DeviceThreads:
    """The same devices in threads: the start of a process takes longer than a small run."""

    def __init__(
        self, url: str, run: str, count: int, home: Path, train: int = TRAIN, test: int = TEST
    ) -> None:
        self.url, self.run, self.count, self.home = url, run, count, home
        self.train, self.test = train, test
        self.events = {f"device-{number}": [] for number in range(1, count + 1)}
        self.succeeded: list[bool] = []
        numbers = range(1, count + 1)
        self.threads = [
            threading.Thread(target=self._take_part, args=(n,), daemon=True) for n in numbers
        ]
        for thread in self.threads:
            thread.start()

    def _take_part(self, number: int) -> None:
        torch.set_num_threads(1)
        name = f"device-{number}"
        reporter = ListReporter(self.events[name])
        with closing(Server(self.url)) as client:
            data = own_data(Part(number, self.count), self.train, self.test)
            participant = Participant(client, data, self.home / name, name, reporter)
            joined = participant.join(self.run, key=f"join-{name}")
            self.succeeded.append(succeeded(joined.take_part()))

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(TIMEOUT_S)
        assert self.succeeded == [True] * self.count

    def stop(self) -> None:
        """Nothing to do: a thread ends with its run, or with the tests' process."""


def own_data(part: Part, train: int, test: int) -> Dataset:
    """The same images as `edge-client join` takes with these limits and ``--part``."""
    data = limit_per_set(load_dataset("digits"), train=train, test=test, seed=0)
    return by_content(Dataset(part.take(data.train, "iid", 0), part.take(data.test, "iid", 0)))


def run_to_the_end(
    operator: OperatorClient,
    settings: RunPlan,
    start_devices: Callable[[str], Devices],
    on_poll: Callable[[Results], None] = lambda _results: None,
) -> tuple[Results, Devices]:
    """Create a run, start its devices, and wait until the run and all of them end."""
    with ExitStack() as stack:
        run = operator.create_run(Custom.of(settings))
        devices = start_devices(run.id)
        stack.callback(devices.stop)
        give_up_at = time.monotonic() + TIMEOUT_S
        while not (results := operator.results(run.id)).run.status.is_over:
            assert time.monotonic() < give_up_at, "the run does not end"
            on_poll(results)
            time.sleep(0.05)
        devices.wait()
        return operator.results(run.id), devices
