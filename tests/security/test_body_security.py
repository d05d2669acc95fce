"""Request bodies that are too large, do not arrive, or use up the memory budget of others."""

from __future__ import annotations

import json
import socket
import struct
import time

import pytest
import torch

from protocol.frames import encode_frame, join_frame
from protocol.messages import Task
from protocol.wire import PROTOCOL_VERSION, VERSION_HEADER
from tests.support.federation import run_settings, smashed, state_of
from tests.support.server import ApiClient, RunningServer, code_of, wait_until

GIB = 1024**3


def head_of(api: ApiClient, method: str, path: str, *lines: str) -> bytes:
    """The bytes of a request's head; the test sends the body."""
    authorization = api.http.headers.get("authorization", "")
    all_lines = [
        f"{method} {path} HTTP/1.1",
        "host: x",
        f"{VERSION_HEADER}: {PROTOCOL_VERSION}",
        f"authorization: {authorization}",
        "idempotency-key: k",
        *lines,
    ]
    return "\r\n".join(all_lines).encode() + b"\r\n\r\n"


def exchange(server: RunningServer, data: bytes, *pieces: bytes) -> tuple[int, dict[str, object]]:
    """Send raw bytes; returns the status and the error of the response."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        for piece in pieces:
            connection.sendall(piece)
        return read_response(connection)


def read_response(connection: socket.socket) -> tuple[int, dict[str, object]]:
    received = b""
    while b"\r\n\r\n" not in received:
        received += receive(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += receive(connection)
    error: dict[str, object] = json.loads(body).get("error", {})
    return status, error


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the server closed the connection without a response"
    return data


ROUTES = [
    ("POST", "/v1/split/forward", 1024 * 1024),
    ("POST", "/v1/split/infer", 1024 * 1024),
    ("POST", "/v1/split/exchange", 1024 * 1024),
    ("POST", "/v1/split/samples", 1024 * 1024),
    ("PUT", "/v1/runs/{run}/update", 1024 * 1024),
    ("PUT", "/v1/runs/{run}/evaluation", 1024 * 1024),
    ("POST", "/v1/runs/{run}/participants", 1024 * 1024),
]


@pytest.mark.parametrize(("method", "path", "limit"), ROUTES)
def test_a_declared_length_above_the_limit_is_refused_before_the_body_is_read(
    server: RunningServer, run: str, member: ApiClient, method: str, path: str, limit: int
) -> None:
    """Tried: a body of 10 GiB is announced on each route. Stopped by: the route's limit, before a
    byte of it is read."""
    head = head_of(member, method, path.format(run=run), f"content-length: {10 * GIB}")
    started = time.monotonic()
    status, error = exchange(server, head)
    assert (status, error["code"]) == (413, "too_large")
    assert error["value"] == 10 * GIB
    assert isinstance(error["limit"], int)
    assert error["limit"] <= limit + 1024 * 1024
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(("method", "path", "limit"), ROUTES)
def test_a_chunked_body_above_the_limit_is_refused(
    server: RunningServer, run: str, member: ApiClient, method: str, path: str, limit: int
) -> None:
    """Tried: a body without an announced length that never ends. Stopped by: the route's limit,
    counted as the chunks arrive."""
    head = head_of(
        member,
        method,
        path.format(run=run),
        "transfer-encoding: chunked",
        "content-type: application/json",
    )
    chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
    status, error = exchange(server, head, *([chunk] * 12), b"0\r\n\r\n")
    assert (status, error["code"]) == (413, "too_large")


def test_a_client_that_sends_a_body_above_the_limit_can_read_the_refusal(
    server: RunningServer, member: ApiClient
) -> None:
    """Tried: 8 MiB are sent without waiting for an answer. Stopped by: a typed refusal that can
    still be read; the connection closes."""
    body = b"x" * (8 * 1024 * 1024)
    response = member.call("POST", "/v1/split/forward", content=body)
    assert code_of(response) == "too_large"
    assert response.headers["connection"] == "close"
    anonymous = server.api()
    response = anonymous.call("POST", "/v1/split/forward", content=body)
    assert code_of(response) == "unauthorized"


def test_a_body_that_does_not_arrive_times_out_and_delays_no_other_request(
    server: RunningServer, run: str, member: ApiClient
) -> None:
    """Tried: a body that stops half way. Stopped by: a deadline for bodies; other requests pass
    meanwhile."""
    head = head_of(member, "POST", "/v1/split/infer", "content-length: 500000")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
        slow.sendall(head + b"x" * 1000)
        assert member.step("infer", smashed(), "meanwhile").is_success
        status, error = read_response(slow)
    assert 400 <= status < 600
    assert error["code"] in ("malformed_frame", "busy")


def test_declared_bodies_that_do_not_arrive_use_no_memory_budget(
    server: RunningServer, member: ApiClient
) -> None:
    """Tried: twenty announced bodies of which one byte comes, to use up the memory budget. Stopped
    by: only bytes that have arrived count."""
    head = head_of(member, "POST", "/v1/split/infer", "content-length: 1000000")
    sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    try:
        for connection in sockets:
            connection.sendall(head + b"x")
        time.sleep(0.1)
        assert member.step("infer", smashed(), "n").is_success
    finally:
        for connection in sockets:
            connection.close()


def test_a_frame_that_decodes_to_more_than_the_limit_is_refused(
    member: ApiClient, cut_member: ApiClient
) -> None:
    """Tried: a compressed frame that decodes to more than the server allows. Stopped by: the
    decoded size is bounded by the server's setting, before it is decoded."""
    shape = (200, 7, 192)
    largest = 1024 * 1024 // (4 * 7 * 192)
    for batch, is_accepted in ((shape[0], False), (largest + 1, False), (largest, True)):
        zeros = torch.zeros(batch, *shape[1:])
        pieces = encode_frame("infer", {"step": "s", "round": 1}, {"smashed": (zeros, "int4+zstd")})
        content = bytes(join_frame(pieces))
        assert len(content) < 4096
        response = member.call("POST", "/v1/split/infer", content=content)
        assert response.is_success == is_accepted, response.text
        if not is_accepted:
            error = response.json()["error"]
            assert (code_of(response), error["field"]) == ("too_large", "smashed")
            assert (error["limit"], error["value"]) == (1024 * 1024, 4 * zeros.numel())
    ids = torch.arange(300, dtype=torch.int64).view(torch.uint8).view(-1, 8).repeat(1, 2)
    response = cut_member.ask("infer", {"step": "s", "round": 1}, ids=ids)
    assert (code_of(response), response.json()["error"]["value"]) == (
        "too_large",
        300 * 4 * 5 * 192,
    )


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/split/infer"), ("PUT", "/v1/runs/{run}/update")]
)
def test_a_used_up_memory_budget_answers_busy_until_it_is_released(
    server: RunningServer, run: str, member: ApiClient, method: str, path: str
) -> None:
    """Tried: a body that stops one byte short while it holds the whole budget. Stopped by: others
    are told to wait, and the deadline releases the budget."""
    head = head_of(member, method, path.format(run=run), "content-length: 1040000")
    with socket.create_connection(("127.0.0.1", server.port)) as large:
        large.sendall(head + b"x" * 1_030_000)
        time.sleep(
            0.5
        )  # until the server has read it; an earlier request would take part of the budget
        response = member.step("infer", smashed(batch=8), "b")
        assert code_of(response) == "busy"
        assert response.json()["error"]["retry_after_s"] > 0
        assert int(response.headers["retry-after"]) >= 1
    wait_until(lambda: member.step("infer", smashed(batch=8), "b").is_success)


def test_an_update_that_the_round_does_not_expect_is_refused_before_it_is_read(
    server: RunningServer,
) -> None:
    """Tried: an update from a device that was not asked for one. Stopped by: round and participant
    are checked before the body is read."""
    operator = server.operator()
    settings = run_settings(min_participants=2, participants_per_round=1, evaluate_every=0)
    run = operator.create(settings, key="unexpected-update").id
    path = f"/v1/runs/{run}/update"
    apis = [server.api(server.api().join(run, name).credential) for name in ("a", "b")]
    trainer = next(api for api in apis if api.assignment(run).task is Task.TRAIN)
    other = next(api for api in apis if api is not trainer)
    started = time.monotonic()
    for line in ("content-length: 1000000", "transfer-encoding: chunked"):
        status, error = exchange(server, head_of(other, "PUT", path, line))
        assert (status, error["code"]) == (409, "stale_round")
    assert time.monotonic() - started < 1.5, "the server waited for a body"
    accepted = trainer.update(run, state_of(1.0), "u")
    assert accepted.is_success
    assert operator.call("POST", f"/v1/runs/{run}/cancel", key="cancel").is_success
    assert trainer.update(run, state_of(1.0), "u").content == accepted.content
    assert code_of(trainer.update(run, state_of(2.0), "u")) == "idempotency_key_reused"
    assert code_of(trainer.update(run, state_of(1.0), "v")) == "run_closed"


def test_a_client_that_disconnects_affects_no_other_client(
    server: RunningServer, run: str, member: ApiClient
) -> None:
    """Tried: connections that are reset in the middle of a body, on each route. Stopped by: the
    request is dropped; the next client is served."""
    for method, path, _ in ROUTES:
        head = head_of(member, method, path.format(run=run), "content-length: 5000")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"x" * 100)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert member.step("infer", smashed(), "after").is_success
