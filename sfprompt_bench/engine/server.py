"""A split server as a process, with a run in an open round."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge_client.transport.client import Server
from protocol.errors import SFPromptError
from protocol.messages import JoinRequest, Task
from protocol.plan import RunPlan
from sfprompt_bench.engine.worker import Cores, pinned_to
from sfprompt_bench.run.preflight import choose_port
from sfprompt_bench.run.processes import Process, wait_until_healthy
from split_server.client import OperatorClient, read_token
from tuning_methods.custom.settings import Custom

HOST = "127.0.0.1"

_START_TIMEOUT_S = 120.0

_CONNECTIONS = 1500

_SAMPLES = 1_000_000  # the claim of each participant


@dataclass(frozen=True)
class OpenRun:
    """A run in a round in which all its participants train."""

    settings: RunPlan
    credentials: tuple[str, ...]
    round: int


class ServerProcess:
    """A server that answers requests."""

    def __init__(self, process: Process, port: int, data_dir: Path) -> None:
        self.port = port
        self.data_dir = data_dir
        self._process = psutil.Process(process.pid)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def cpu_s(self) -> float:
        """Measure the server's CPU seconds so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def resident_bytes(self) -> int:
        """Measure the server's resident memory."""
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
            credentials = []
            for number in range(1, settings.federation.min_participants + 1):
                request = JoinRequest(
                    name=f"device-{number}",
                    train_samples=_SAMPLES,
                    test_samples=0,
                    num_classes=settings.model.num_classes,
                )
                credentials.append(device.join(run, request, f"join-{number}").credential)
            device.authenticate(credentials[-1])
            assignment = device.assignment(run, None, 0.0)
            if assignment.task != Task.TRAIN:
                raise SFPromptError(f"the round did not open: {assignment.task}")
            return OpenRun(settings, tuple(credentials), assignment.round)
        finally:
            operator.close()
            device.close()


@contextmanager
def running_server(
    name: str, folder: Path, cores: Cores, settings: Mapping[str, object]
) -> Iterator[ServerProcess]:
    """Run a server on its cores, with these settings, until the end of the block.

    Raises:
        SFPromptError: it does not start; with the end of its log.
    """
    port, data_dir = choose_port(0), folder / name
    values = {
        "host": HOST,
        "port": port,
        "data_dir": str(data_dir),
        "torch_threads": cores.threads,
        "max_address_connections": _CONNECTIONS,  # all clients are on this machine
        **settings,
    }
    config = folder / f"{name}.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    with pinned_to(cores.server):
        arguments = ["split_server.cli", "serve", "--config", str(config)]
        process = Process(name, arguments, folder, threads=cores.threads)
    try:
        probe = OperatorClient(f"http://{HOST}:{port}")
        try:
            wait_until_healthy(process, probe.is_healthy, _START_TIMEOUT_S)
        finally:
            probe.close()
        yield ServerProcess(process, port, data_dir)
    finally:
        process.stop()
