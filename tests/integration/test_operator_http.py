"""The operator's view of a run and its commands, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner

from split_server.cli import app
from tests.support.federation import OPERATOR
from tests.support.server import RunningServer, code_of, joined, new_run, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


def command(server: RunningServer, *words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--url", server.url, "--operator-token", OPERATOR])
    assert done.exit_code == 0, done.output
    return done.output


def messages(response: httpx.Response) -> Iterator[dict[str, str]]:
    """The server-sent events of a response, as fields."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield fields
            fields = {}


def test_the_stream_tells_events_and_states_until_the_run_is_over(server: RunningServer) -> None:
    operator = server.operator()
    run = new_run(operator, min_participants=2)
    with operator.http.stream("GET", f"/v1/runs/{run}/stream") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        seen = messages(response)
        first = next(seen)
        assert (first["id"], json.loads(first["data"])["kind"]) == ("1", "run_created")
        assert json.loads(next(seen)["data"])["summary"].startswith("The run waits: 0 of 2")
        joined(server, run, "kitchen")
        assert json.loads(next(seen)["data"])["data"]["name"] == "kitchen"
        assert "kitchen; 1 more" in json.loads(next(seen)["data"])["summary"]
        assert operator.call("POST", f"/v1/runs/{run}/cancel", key="c").is_success
        *_, last = seen
        assert last["event"] == "over"
    resumed = {"last-event-id": "2"}
    again = operator.call("GET", f"/v1/runs/{run}/stream", headers=resumed).text
    assert "id: 1\n" not in again
    assert "id: 2\n" not in again
    assert "id: 3\n" in again
    bad = operator.call("GET", f"/v1/runs/{run}/stream", headers={"last-event-id": "x"})
    assert code_of(bad) == "invalid_field"


def test_the_commands_show_pause_resume_and_delete(server: RunningServer) -> None:
    run = new_run(server.operator(), min_participants=2)
    joined(server, run, "kitchen")
    shown = command(server, "status", run)
    assert "The run waits: 1 of 2 devices: kitchen; 1 more needed." in shown
    assert max(map(len, shown.splitlines())) <= 80
    device = json.loads(command(server, "status", run, "--json"))["devices"][0]
    assert (device["name"], device["status"]) == ("kitchen", "waiting")
    assert "pauses" in command(server, "pause", run)
    assert "The run is paused" in command(server, "status", run)
    assert json.loads(command(server, "resume", run, "--json"))["paused"] is False
    command(server, "cancel", run)
    assert run in json.loads(command(server, "gc", "--yes", "--json"))["deleted"]
    assert "nothing to delete" in command(server, "gc")
