"""A server that is killed in the middle of a round, and another that goes on where it was."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import split_model
from protocol.messages import Results, RunStatus, Task
from split_server.client import OperatorClient, read_token
from split_server.credentials import load_secret
from tests.server_doubles import (
    OPERATOR,
    Api,
    code_of,
    random_state,
    run_settings,
    smashed,
    state_of,
    wait_until,
)


class ServerProcess:
    """``split-server serve`` as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "split_server.cli", "serve", "--port", str(self.port)]
        command += ["--data-dir", str(self.folder), "--torch-threads", "1"]
        command += ["--operator-token", OPERATOR]
        with (self.folder.parent / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers, 60)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder.parent / "log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/v1/health", trust_env=False).is_success
        return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path / "node")
    yield running
    if running.process.poll() is None:
        running.kill()


def test_a_killed_server_goes_on_in_the_open_round(server: ServerProcess) -> None:
    states = {"a": random_state(1), "b": random_state(2), "c": random_state(3)}
    apis: dict[str, Api] = {}
    operator = Api(server.url, OPERATOR)
    settings = run_settings(min_participants=3, rounds=1, min_updates=3)
    run = operator.create(settings).id
    for name in states:
        joiner = Api(server.url)
        apis[name] = Api(server.url, joiner.join(run, name).credential)
        joiner.close()
    before = apis["a"].assignment(run)
    assert before.task is Task.TRAIN
    assert apis["c"].update(run, states["c"], "u", samples=30).is_success
    assert apis["a"].update(run, states["a"], "u", samples=10).is_success
    assert apis["b"].step("forward", smashed(), "s").is_success
    server.kill()
    server.start()

    for name, task in (("a", Task.WAIT), ("b", Task.TRAIN), ("c", Task.WAIT)):
        after = apis[name].assignment(run)
        assert (after.task, after.round, after.attempt) == (task, 1, 0)
        assert after.state == before.state
    assert apis["a"].update(run, states["a"], "u", samples=10).json() == {
        "round": 1,
        "samples": 10,
    }
    assert code_of(apis["b"].step("backward", smashed(), "s")) == "step_lost"
    assert apis["b"].update(run, states["b"], "u", samples=20).is_success
    for name in states:
        assert apis[name].assignment(run).task is Task.EVALUATE
        assert apis[name].evaluate(run, "e").is_success
    results = Results.model_validate(operator.call("GET", f"/v1/runs/{run}/results").json())
    assert results.run.status is RunStatus.FINISHED
    assert (results.rounds[0].samples, len(results.rounds[0].updated)) == (60, 3)
    blob = results.rounds[0].state
    assert blob is not None
    mean = split_model.load_state(
        server.folder / "runs" / run / "states" / f"{blob.sha256}.safetensors"
    )
    for name, tensor in mean.items():
        exact = sum(
            states[who][name].double() * weight for who, weight in (("a", 10), ("b", 20), ("c", 30))
        )
        assert (tensor.double() - exact / 60).abs().max() < 1e-7
    for api in (operator, *apis.values()):
        api.close()


def test_a_stopped_server_leaves_everything_in_order(server: ServerProcess) -> None:
    operator = OperatorClient(server.url, OPERATOR)
    run = operator.create_run(run_settings(min_participants=2)).id
    joiner = Api(server.url)
    device = Api(server.url, joiner.join(run).credential)
    device.assignment(run)
    counted = operator.results(run).traffic
    assert server.stop() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    server.start()
    assert operator.results(run).traffic == counted
    assert device.assignment(run).task is Task.WAIT
    assert len(load_secret(server.folder / "secret")) == 32
    second = subprocess.run(
        [
            sys.executable,
            "-m",
            "split_server.cli",
            "serve",
            "--port",
            "0",
            "--data-dir",
            str(server.folder),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert second.returncode == 2
    assert "another server is using this folder" in " ".join(second.stderr.split())
    assert "Traceback" not in second.stderr
    assert read_token(server.folder)
    device.update(run, state_of(0.0), "u")
    for api in (joiner, device, operator):
        api.close()
