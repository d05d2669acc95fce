"""Split servers for the end-to-end tests: a process that can be killed, a thread, small runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.federation import FederationSettings
from protocol.plan import ModelPlan, RunPlan, TrainingPlan
from sfprompt_bench.run.preflight import choose_port
from sfprompt_bench.run.processes import wait_until_healthy
from split_server.client import OperatorClient, read_token
from tests.support.processes import CommandProcess
from tests.support.server import RunningServer, running_server

SMALL = ModelPlan(backbone="test_vit", weights="random:3", image_size=32, cut=1, prompt_count=4)


def small_run(*, rounds: int = 2, devices: int = 1, seed: int = 0, **training: object) -> RunPlan:
    """A run that takes seconds: an untrained tiny transformer on 32 px images."""
    return RunPlan(
        name="small",
        seed=seed,
        model=SMALL,
        federation=FederationSettings(rounds=rounds, min_participants=devices),
        training=TrainingPlan.model_validate(
            {"batch_size": 16, "keep_fraction": 0.5, "prune_per_class": True, **training}
        ),
    )


class ServerProcess:
    """A split server as a process, which can be killed and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.data_dir = folder, folder / "server"
        self.port = choose_port(0)
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        arguments = ["serve", "--port", str(self.port)]
        arguments += ["--data-dir", str(self.data_dir), "--torch-threads", "1"]
        # The rows that share a batch may change how a matrix product is rounded.
        arguments += ["--max-batch-samples", "1"]
        self.process = CommandProcess("split_server.cli", arguments, self.folder / "server.log")
        probe = OperatorClient(self.url)
        wait_until_healthy(self.process, probe.is_healthy, 60)
        probe.close()

    def kill_and_restart(self) -> None:
        self.process.kill()
        self.start()

    def operator(self) -> OperatorClient:
        return OperatorClient(self.url, read_token(self.data_dir))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One process for all tests: its start takes seconds, and each test has its own runs."""
    process = ServerProcess(tmp_path_factory.mktemp("server-process"))
    yield process
    process.process.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server in a thread of this process; its results are the same bits as the process's."""
    with running_server(tmp_path_factory.mktemp("node"), max_batch_samples=1) as running:
        yield running


def data_dir_of(node: RunningServer) -> Path:
    return node.server._application.settings.data_dir
