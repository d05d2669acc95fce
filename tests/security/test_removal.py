"""What a participant tries after the operator has removed it, and what stops it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_client import cli as edge_cli
from edge_client.storage.identity import Identity
from protocol.messages import Results, Task
from split_server.cli import app as split_server
from split_server.http.rights import RIGHTS, Role
from tests.security.test_rights import Run, send
from tests.support.federation import OPERATOR, run_settings, smashed, state_of
from tests.support.samples import sample_ids
from tests.support.server import (
    ApiClient,
    RunningServer,
    code_of,
    joined,
    new_run,
    running_server,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


def remove(server: RunningServer, run: str, participant: str = "p0001") -> None:
    path = f"/v1/runs/{run}/participants/{participant}"
    answer = server.operator().call("DELETE", path, key=uuid.uuid4().hex)
    assert answer.is_success, answer.text


def command(server: RunningServer, *words: str) -> str:
    options = ["--url", server.url, "--operator-token", OPERATOR]
    done = CliRunner().invoke(split_server, [*words, *options], catch_exceptions=False)
    return done.output


def events(server: RunningServer, run: str) -> list[tuple[str, dict[str, object]]]:
    answer = server.operator().call("GET", f"/v1/runs/{run}/events").json()
    return [(event["kind"], event["data"]) for event in answer]


def test_its_credential_opens_no_route_any_more(server: RunningServer) -> None:
    """Tried: a removed device sends every request that a participant may send. Stopped by: its
    credential is revoked."""
    view = server.operator().create(run_settings(min_participants=9), key=uuid.uuid4().hex)
    device = joined(server, view.id)
    remove(server, view.id)
    for right in RIGHTS:
        if Role.PARTICIPANT in right.roles and Role.STRANGER not in right.roles:
            answer = send(device, right, Run(view.id, view.state.sha256))
            assert code_of(answer) == "removed", right
    assert device.call("GET", "/v1/health").is_success


def test_it_cannot_join_again_with_its_key(server: RunningServer) -> None:
    """Tried: a removed device joins with the key of its first join, with the same and with other
    content. Stopped by: the key is revoked with it."""
    run = new_run(server.operator(), min_participants=9)
    server.api().join(run, "a", key="the-key")
    remove(server, run)
    path = f"/v1/runs/{run}/participants"
    for name, train in (("a", 100), ("b", 7)):
        request = {"name": name, "train_samples": train, "test_samples": 1, "num_classes": 10}
        assert code_of(server.api().call("POST", path, key="the-key", json=request)) == "removed"


def test_a_waiting_device_learns_of_it_at_once(server: RunningServer) -> None:
    """Tried: a removed device keeps a request open that waits. Stopped by: the wait ends with the
    removal."""
    run = new_run(server.operator(), min_participants=9)
    device = joined(server, run)
    answers: list[str] = []
    path = f"/v1/runs/{run}/assignment?task=wait&round=0&attempt=0&wait=20"
    poll = threading.Thread(target=lambda: answers.append(code_of(device.call("GET", path))))
    poll.start()
    remove(server, run)
    poll.join(5)
    assert answers == ["removed"]


def test_its_samples_are_dropped_and_its_update_does_not_count(server: RunningServer) -> None:
    """Tried: a round is poisoned before the removal. Stopped by: an update that is not averaged yet
    is void."""
    run = new_run(server.operator(), rounds=1, min_participants=3, evaluate_every=0)
    good, poisoner, other = (joined(server, run, name) for name in ("a", "b", "c"))
    for device, value in ((poisoner, 9.0), (good, 1.0)):
        assert device.assignment(run).task is Task.TRAIN
        assert device.update(run, state_of(value), "u").is_success
    remove(server, run, "p0002")
    assert good.assignment(run).task is Task.WAIT, "the round goes on"
    assert other.update(run, state_of(3.0), "u").is_success
    assert good.assignment(run).task is Task.STOP
    results = Results.model_validate(
        server.operator().call("GET", f"/v1/runs/{run}/results").json()
    )
    assert results.rounds[0].updated == ("p0001", "p0003")
    assert ("participant_removed", {"participant": "p0002", "name": "b"}) in events(server, run)


def test_a_round_does_not_wait_for_it(server: RunningServer) -> None:
    """Tried: a device that never answers is removed, and would hold the round. Stopped by: the
    round no longer counts it."""
    run = new_run(server.operator(), rounds=1, min_participants=2, evaluate_every=0)
    good, _ = joined(server, run, "a"), joined(server, run, "b")
    assert good.assignment(run).task is Task.TRAIN
    assert good.update(run, state_of(1.0), "u").is_success
    assert good.assignment(run).task is Task.WAIT
    remove(server, run, "p0002")
    assert good.assignment(run).task is Task.STOP


def test_its_cached_samples_are_gone(server: RunningServer) -> None:
    """Tried: a removed device's samples stay in memory. Stopped by: they are dropped with it."""
    store = server.server._application.services.samples
    before = store.memory_bytes
    run = new_run(
        server.operator(), prompt_at="cut", wire={"keep_smashed": True}, min_participants=9
    )
    device = joined(server, run)
    rows = smashed(batch=2)[:, :5]
    assert device.ask("samples", {}, ids=sample_ids(1, 2), smashed=rows).is_success
    assert store.memory_bytes > before
    remove(server, run)
    assert store.memory_bytes == before


def test_a_removal_outlives_a_restart(tmp_path: Path) -> None:
    """Tried: a removed device comes back after the server was started again. Stopped by: the
    removal is on disk."""
    with running_server(tmp_path) as first:
        run = first.operator().create(run_settings(min_participants=9)).id
        credential = first.api().join(run, "a", key="the-key").credential
        remove(first, run)
    with running_server(tmp_path) as second:
        answer = second.api(credential).call("GET", f"/v1/runs/{run}/assignment")
        assert code_of(answer) == "removed"
        request = {"name": "a", "train_samples": 100, "test_samples": 10, "num_classes": 10}
        path = f"/v1/runs/{run}/participants"
        assert code_of(second.api().call("POST", path, key="the-key", json=request)) == "removed"


def test_the_operator_removes_by_name_or_id(server: RunningServer) -> None:
    """Tried: nothing. A name that several devices have is refused with their ids."""
    run = new_run(server.operator(), min_participants=9)
    server.api().join(run, "kitchen")
    for key in ("2", "3"):  # devices without images may share a name
        server.api().join(run, "twin", key=key, train=0, test=0)
    assert "kitchen (p0001) was removed" in command(server, "remove-device", run, "kitchen")
    with pytest.raises(Exception, match=r"several devices.*p0002.*p0003"):
        command(server, "remove-device", run, "twin")
    assert "twin (p0003) was removed" in command(server, "remove-device", run, "p0003")
    with pytest.raises(Exception, match="no such device"):
        command(server, "remove-device", run, "nobody")


def test_the_device_ends_with_a_message_and_a_code_of_its_own(
    server: RunningServer, tmp_path: Path
) -> None:
    """Tried: nothing. The removed device's command says so and ends with code 4."""
    run = new_run(server.operator(), min_participants=9)
    with Identity(tmp_path / "identities", server.url, run, "kitchen") as identity:
        server.api().join(run, "kitchen", key=identity.key)
    remove(server, run)
    words = ["join", server.url, "--run", run, "--data", "digits", "--limit-train", "20"]
    words += ["--name", "kitchen", "--home", str(tmp_path), "--progress", "json"]
    done = CliRunner().invoke(edge_cli.app, words)
    assert done.exit_code == edge_cli.REMOVED == 4
    assert "Removed from the run: the operator removed this participant" in done.stderr


def finished(server: RunningServer) -> tuple[str, ApiClient]:
    run = new_run(server.operator(), rounds=1, evaluate_every=0)
    device = joined(server, run)
    assert device.assignment(run).task is Task.TRAIN
    assert device.update(run, state_of(1.0), "u").is_success
    assert device.assignment(run).task is Task.STOP
    return run, device


def test_a_deleted_run_leaves_neither_rows_nor_files(server: RunningServer) -> None:
    """Tried: a run is read, or joined, after it was deleted. Stopped by: rows and files are
    gone."""
    run, device = finished(server)
    folder = server.server._application.settings.data_dir / "runs" / run
    assert folder.is_dir()
    assert command(server, "delete", run) == f"run {run} is deleted\n"
    assert not folder.exists()
    operator = server.operator()
    assert code_of(operator.call("GET", f"/v1/runs/{run}/results")) == "not_found"
    assert code_of(device.call("GET", f"/v1/runs/{run}/assignment")) == "not_found"
    assert run not in [each["id"] for each in operator.call("GET", "/v1/runs").json()]
    store = server.server._application.services.store
    with store.reading() as session:
        for table in ("runs", "participants", "rounds", "updates", "events", "evaluations"):
            column = "id" if table == "runs" else "run_id"
            query = f"SELECT count(*) FROM {table} WHERE {column} = '{run}'"
            assert session.connection().exec_driver_sql(query).scalar_one() == 0
        query = f"SELECT count(*) FROM answers WHERE scope LIKE '{run}/%'"
        assert session.connection().exec_driver_sql(query).scalar_one() == 0


def test_a_repeated_deletion_succeeds_and_a_running_run_is_not_deleted(
    server: RunningServer,
) -> None:
    """Tried: an operator deletes a run twice, or while devices take part. Stopped by: the
    idempotency key; a run that is not over is refused."""
    run, _ = finished(server)
    operator = server.operator()
    for _ in range(2):
        assert operator.call("DELETE", f"/v1/runs/{run}", key=f"delete-{run}").json() == {}
    assert code_of(operator.call("DELETE", f"/v1/runs/{run}", key="another")) == "not_found"
    running = new_run(operator, min_participants=9)
    answer = operator.call("DELETE", f"/v1/runs/{running}", key="running")
    assert (code_of(answer), answer.json()["error"]["value"]) == ("conflict", "waiting")
