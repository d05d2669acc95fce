"""``edge-client leave``: the server deletes a device's samples, with or without the device."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_client import cli
from edge_client.storage.identity import Identity
from protocol.messages import Task
from tests.support.federation import smashed
from tests.support.samples import sample_ids
from tests.support.server import ApiClient, RunningServer, code_of, new_run, running_server

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture
def leave(
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Iterator[Command]:
    terminated = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        options = ["--name", "kitchen", "--home", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["edge-client", "leave", server.url, *options, *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, terminated)


def a_device(server: RunningServer, home: Path) -> tuple[str, ApiClient]:
    """Join, store two samples on the server, and stop."""
    keeps = {"keep_smashed": True}
    run = new_run(server.operator(), prompt_at="cut", wire=keeps, min_participants=2)
    credential = server.api().join(run, "kitchen").credential
    with Identity(home / "identities", server.url, run, "kitchen") as identity:
        identity.remember(credential)
    device = server.api(credential)
    rows = smashed(batch=2)[:, :5]
    assert device.ask("samples", {}, ids=sample_ids(1, 2), smashed=rows).is_success
    return run, device


def cached_bytes(server: RunningServer) -> int:
    store = server.server._application.services.samples
    return int(store.memory_bytes)


def test_after_leaving_the_samples_are_deleted_and_the_task_is_stop(
    server: RunningServer, leave: Command, tmp_path: Path
) -> None:
    before = cached_bytes(server)
    run, device = a_device(server, tmp_path)
    assert cached_bytes(server) > before
    code, out, _ = leave("--run", run)
    assert (code, out) == (0, f"kitchen has left: run {run}\n")
    assert cached_bytes(server) == before
    assert code_of(device.call("DELETE", f"/v1/runs/{run}/samples")) == "forbidden"
    assert device.assignment(run).task is Task.STOP


def test_a_device_can_leave_while_its_process_takes_part(
    server: RunningServer, leave: Command, tmp_path: Path
) -> None:
    run, device = a_device(server, tmp_path)
    with Identity(tmp_path / "identities", server.url, run, "kitchen"):
        code, out, _ = leave("--run", run)
    assert (code, out) == (0, f"kitchen has left: run {run}\n")
    assert device.assignment(run).task is Task.STOP


def test_samples_can_be_deleted_without_leaving(
    server: RunningServer, leave: Command, tmp_path: Path
) -> None:
    before = cached_bytes(server)
    run, device = a_device(server, tmp_path)
    assert leave("--run", run, "--samples-only")[0] == 0
    assert cached_bytes(server) == before
    assert device.call("GET", f"/v1/runs/{run}/assignment").is_success


def test_a_device_that_has_not_joined_cannot_leave(server: RunningServer, leave: Command) -> None:
    run = new_run(server.operator())
    code, _, err = leave("--run", run)
    assert code == 2
    assert "has not joined" in err
