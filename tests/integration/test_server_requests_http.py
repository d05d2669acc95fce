"""The server over real HTTP: files, versions, and every refusal."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator

import pytest
from sqlalchemy.exc import OperationalError

from protocol.errors import error_from_wire
from protocol.messages import RunView
from protocol.wire import PROTOCOL_VERSION, VERSION_HEADER
from tests.support.federation import smashed, state_of
from tests.support.server import ApiClient, RunningServer, code_of, joined, new_run, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture
def operator(server: RunningServer) -> ApiClient:
    return server.operator()


def test_files_have_etags_and_ranges(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator)
    api = joined(server, run)
    view = RunView.model_validate(api.call("GET", f"/v1/runs/{run}").json())
    for path, blob in (
        (f"/v1/runs/{run}/head", view.head),
        (f"/v1/runs/{run}/states/{view.state.sha256}/state", view.state),
    ):
        whole = api.call("GET", path)
        assert len(whole.content) == blob.nbytes
        assert whole.headers["etag"] == f'"{blob.sha256}"'
        rest = api.call("GET", path, headers={"range": "bytes=100-"})
        assert (rest.status_code, rest.content) == (206, whole.content[100:])
        same = api.call("GET", path, headers={"if-none-match": whole.headers["etag"]})
        assert (same.status_code, same.content) == (304, b"")
        behind = api.call("GET", path, headers={"range": f"bytes={blob.nbytes}-"})
        assert code_of(behind) == "invalid_field"
        part = api.call("GET", path, headers={"range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert code_of(api.call("GET", f"/v1/runs/{run}/states/{'0' * 64}/state")) == "not_found"
    assert code_of(api.call("GET", f"/v1/runs/{run}/states/..%2Fhead/state")) in (
        "not_found",
        "invalid_field",
    )


@pytest.mark.parametrize(
    ("wanted", "limit"),
    [
        ("bytes=5-4", 5),
        ("bytes=0-1,5-6", "bytes=N-"),
        ("bytes=-5", "bytes=N-"),
        ("bytes=-", "bytes=N-"),
        ("bytes=\u0663-".encode(), "bytes=N-"),
        ("lines=0-", "bytes=N-"),
        ("5", "bytes=N-"),
        ("", "bytes=N-"),
        ("bytes=" + 30 * "9" + "-", "bytes=N-"),
    ],
)
def test_an_invalid_range_is_refused_with_a_typed_error(
    server: RunningServer, operator: ApiClient, wanted: str | bytes, limit: object
) -> None:
    run = new_run(operator)
    path = f"/v1/runs/{run}/head"
    answer = operator.http.get(path, headers={"range": wanted})
    error = answer.json()["error"]
    assert (answer.status_code, code_of(answer)) == (422, "invalid_field")
    assert (error["field"], error["limit"]) == ("range", limit)


def test_versions_are_checked(server: RunningServer) -> None:
    api = server.api()
    wrong = api.call("GET", "/v1/runs", headers={VERSION_HEADER: "1"})
    assert (code_of(wrong), wrong.status_code) == ("unsupported_version", 426)
    assert wrong.json()["error"]["limit"] == PROTOCOL_VERSION
    del api.http.headers[VERSION_HEADER]
    assert api.call("GET", "/v1/runs").is_success
    assert code_of(api.call("POST", "/v1/runs", key="k")) == "unsupported_version"


def test_every_refusal_is_typed_and_has_a_request_id(server: RunningServer) -> None:
    api = server.api()
    for method, path, code in (
        ("GET", "/nowhere", "not_found"),
        ("GET", "/v1/runs/none", "not_found"),
        ("PATCH", "/v1/runs", "invalid_request"),
        ("GET", "/v1/split/forward", "invalid_field"),
    ):
        answer = api.call(method, path, headers={"x-request-id": "mine-1"})
        assert code_of(answer) == code
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["error"]["request_id"] == "mine-1"
        assert error_from_wire(answer.json(), answer.status_code).code == code
    odd = api.call("GET", "/v1/health", headers={"x-request-id": "no spaces here"})
    assert odd.headers["x-request-id"] != "no spaces here"


@pytest.mark.parametrize(
    ("message", "field", "limit", "value"),
    [
        ({"round": -1}, "round", 0, -1),
        ({"round": 2**53}, "round", 2**53, 2**53),
        ({"unknown": 1}, "unknown", None, 1),
        ({"correct": 11}, "body", None, None),
    ],
)
def test_a_message_out_of_range_is_refused_with_the_bound(
    server: RunningServer,
    operator: ApiClient,
    message: dict[str, int],
    field: str,
    limit: object,
    value: object,
) -> None:
    run = new_run(operator, min_participants=2)
    answer = joined(server, run).evaluate(run, "e", **message)
    error = answer.json()["error"]
    assert (code_of(answer), error["field"]) == ("invalid_field", field)
    assert (error.get("limit"), error.get("value")) == (limit, value)


def test_a_query_out_of_range_is_refused_with_the_bound(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator, min_participants=2)
    answer = joined(server, run).call("GET", f"/v1/runs/{run}/assignment?wait=3601")
    error = answer.json()["error"]
    assert (code_of(answer), error["field"], error["limit"]) == ("invalid_field", "wait", 3600)


@pytest.mark.parametrize(
    "content", [b'{"rounds": 1, x', b"{", b'{"name": "\xff"}', b"[" * 100_000, b"\xff\xfe"]
)
def test_invalid_json_is_refused_as_a_whole(operator: ApiClient, content: bytes) -> None:
    json = {"content-type": "application/json"}
    answer = operator.call("POST", "/v1/runs", key="no-json", content=content, headers=json)
    error = answer.json()["error"]
    assert (answer.status_code, code_of(answer), error["field"]) == (422, "invalid_field", "body")


def test_a_wrong_method_is_named(server: RunningServer) -> None:
    api = server.api()
    answer = api.call("PATCH", "/v1/runs/r/evaluation")
    error = answer.json()["error"]
    assert (answer.status_code, code_of(answer)) == (405, "invalid_request")
    assert (error["field"], error["value"]) == ("method", "PATCH")
    assert answer.headers["allow"] == "PUT"
    error = api.call("GET", "/v1/split/forward").json()["error"]
    assert (error["field"], error["limit"], error["value"]) == ("method", "POST", "GET")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OperationalError("INSERT", None, sqlite3.OperationalError("database or disk is full")),
    ],
)
def test_a_full_disk_is_a_busy_error(
    server: RunningServer, operator: ApiClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    api = joined(server, run := new_run(operator))
    api.assignment(run)

    def full(*_args: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr("split_server.storage.run_files.RunFiles.write_update", full)
        answer = api.update(run, state_of(1.0), "u")
    assert (answer.status_code, code_of(answer)) == (503, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    assert api.update(run, state_of(1.0), "u").is_success


def test_an_unexpected_failure_is_typed_too(
    server: RunningServer, operator: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(operator)
    api = joined(server, run)
    api.assignment(run)

    def broken(*_args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("split_server.federation.views.results", broken)
    answer = operator.call("GET", f"/v1/runs/{run}/results")
    assert (answer.status_code, code_of(answer)) == (500, "internal_error")
    assert "ZeroDivision" not in answer.text
    monkeypatch.setattr("split_server.payloads.requests.decode_smashed", broken)
    assert code_of(api.step("infer", smashed(), "s")) == "internal_error"
