"""A server that is killed within a round, and its restart, which resumes the round."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from protocol.errors import InvalidField
from protocol.messages import Results, RunStatus, Task
from split_model.checkpoints.state import load_state
from split_server.app import create_app, serve_until_stopped
from split_server.storage.database import Store
from split_server.storage.traffic import Meter
from tests.support.federation import OPERATOR, random_state, run_settings, smashed
from tests.support.processes import CommandProcess
from tests.support.server import ApiClient, code_of, running_server, server_settings, wait_until


class ServerProcess:
    """``split-server serve`` in a separate process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["serve", "--port", str(port), "--data-dir", str(folder)]
        arguments += ["--torch-threads", "1", "--operator-token", OPERATOR]
        self.process = CommandProcess("split_server.cli", arguments, folder.parent / "log")
        wait_until(self._answers, 60)

    def _answers(self) -> bool:
        assert self.process.exit_code() is None, self.process.last_lines()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/v1/health", trust_env=False).is_success
        return False

    def kill(self) -> None:
        self.process.kill()


def test_a_folder_without_its_database_is_refused_and_unchanged(tmp_path: Path) -> None:
    node = tmp_path / "node"
    state = node / "runs" / "calm-otter-2345" / "states" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"x")
    settings = server_settings(node)
    with pytest.raises(InvalidField, match=r"has 1 runs and no server\.sqlite"):
        serve_until_stopped(create_app(settings), settings)
    assert state.exists()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path / "node")
    yield running
    running.kill()


def test_a_killed_server_resumes_the_open_round(server: ServerProcess) -> None:
    states = {"a": random_state(1), "b": random_state(2), "c": random_state(3)}
    operator = ApiClient(server.url, OPERATOR)
    run = operator.create(run_settings(min_participants=3, rounds=1, min_updates=3)).id
    anonymous = ApiClient(server.url)
    credentials = {name: anonymous.join(run, name).credential for name in states}
    devices = {name: ApiClient(server.url, credential) for name, credential in credentials.items()}
    before = devices["a"].assignment(run)
    assert before.task is Task.TRAIN
    assert devices["c"].update(run, states["c"], "u", samples=30).is_success
    receipt = devices["a"].update(run, states["a"], "u", samples=10).json()
    assert devices["b"].step("forward", smashed(), "s").is_success
    counted = operator.call("GET", f"/v1/runs/{run}/results").json()["traffic"]
    time.sleep(1.3)
    server.kill()
    for api in (operator, anonymous, *devices.values()):
        api.close()

    with running_server(server.folder) as again:
        kept = again.operator().call("GET", f"/v1/runs/{run}/results").json()["traffic"]
        assert kept == counted, "a second after they were counted, bytes outlive a kill"
        devices = {name: again.api(credential) for name, credential in credentials.items()}
        for name, task in (("a", Task.WAIT), ("b", Task.TRAIN), ("c", Task.WAIT)):
            after = devices[name].assignment(run)
            assert (after.task, after.round, after.attempt) == (task, 1, 0)
            assert after.state == before.state
        assert again.api().join(run, "b").credential == credentials["b"]
        assert devices["a"].update(run, states["a"], "u", samples=10).json() == receipt
        assert code_of(devices["b"].step("backward", smashed(), "s")) == "step_lost"
        assert devices["b"].step("forward", smashed(), "s").is_success
        assert devices["b"].step("backward", smashed(), "s").is_success
        assert devices["b"].update(run, states["b"], "u", samples=20).is_success
        for device in devices.values():
            assert device.assignment(run).task is Task.EVALUATE
            assert device.evaluate(run, "e").is_success
        answer = again.operator().call("GET", f"/v1/runs/{run}/results")
        results = Results.model_validate(answer.json())

    assert results.run.status is RunStatus.FINISHED
    assert (results.rounds[0].samples, len(results.rounds[0].updated)) == (60, 3)
    path = server.folder / "runs" / run / "states" / f"{results.run.state.sha256}.safetensors"
    weights = {"a": 10, "b": 20, "c": 30}
    for name, tensor in load_state(path).items():
        exact = sum(states[who][name].double() * weight for who, weight in weights.items()) / 60
        assert (tensor.double() - exact).abs().max() < 1e-6
    meter, store = Meter(), Store(server.folder / "server.sqlite")
    with store.reading() as session:
        meter.load(session)
    store.close()
    assert meter.run(run).to_dict() == results.traffic, "a stopped server has lost no byte"
