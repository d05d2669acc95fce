"""Attacks by connections and by what precedes a body, and what stops them."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from protocol.messages import Task
from tests.support.federation import smashed
from tests.support.server import ApiClient, RunningServer, joined, new_run, running_server

MIB = 1024 * 1024

HEALTH = b"GET /v1/health HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that is full with 40 connections."""
    limits = {
        "max_connections": 40,
        "max_address_connections": 20,
        "max_participant_connections": 4,
    }
    folder = tmp_path_factory.mktemp("node")
    with running_server(folder, first_request_timeout_s=0.5, **limits) as running:
        yield running


@pytest.fixture(scope="module")
def trainer(small: RunningServer) -> ApiClient:
    run = new_run(small.operator())
    api = joined(small, run)
    assert api.assignment(run).task is Task.TRAIN
    return api


def connect(server: RunningServer, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 10, (source, 0))


@contextmanager
def opened(server: RunningServer, count: int, first: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent something, which is no whole request."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(server)) for _ in range(count)]
        for each in sockets:
            try:
                each.sendall(first)
            except OSError:  # it is closed already
                continue
        yield sockets


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data


@pytest.mark.parametrize("first", [b"", HEALTH, b"PUT / HTTP/1.1\r\ncontent-length: 9\r\n\r\n1"])
def test_connections_without_a_whole_request_lock_nobody_out(
    small: RunningServer, trainer: ApiClient, first: bytes
) -> None:
    """Tried: more idle or slow connections than the server has. Stopped by: the limit of an
    address and the room for known senders; the longest idle gives way."""
    with opened(small, 100, first) as sockets:
        for number in range(3):
            step = f"{first[:1]!r}{number}".encode().hex()
            assert trainer.step("infer", smashed(), step).is_success
            assert small.api().call("GET", "/v1/health").is_success  # a new connection
            for each in sockets[-10:]:
                try:
                    each.sendall(b"1")
                except OSError:
                    continue
        began = time.monotonic()
        for each in sockets:
            received(each)
        assert time.monotonic() - began < 5, "they are closed after `first_request_timeout_s`"


def test_a_known_connection_stays_while_others_come_and_go(
    small: RunningServer, trainer: ApiClient
) -> None:
    """Tried: connections come and go to close that of a device. Stopped by: unknown ones
    go first."""
    authorization = trainer.http.headers["authorization"].encode()
    whole = HEALTH + b"authorization: " + authorization + b"\r\n\r\n"
    with connect(small) as device:
        device.sendall(whole)
        assert device.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(2):
            with opened(small, 60, b"G"):
                time.sleep(1.1)
        device.sendall(whole)
        assert device.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_participant_has_a_limited_number_of_connections(
    small: RunningServer, trainer: ApiClient
) -> None:
    """Tried: one participant that opens connections without end. Stopped by: its own limit; its
    own longest idle connection is closed."""
    authorization = trainer.http.headers["authorization"].encode()
    whole = HEALTH + b"authorization: " + authorization + b"\r\n\r\n"
    trainer.http.close()
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(small)) for _ in range(6)]
        for each in sockets:
            each.sendall(whole)
            assert each.recv(4096).startswith(b"HTTP/1.1 200")
        for each in sockets[:2]:
            assert received(each) == b""
        sockets[2].sendall(whole)
        assert sockets[2].recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /", b"a" * 65536),
        (b"A", b"A" * 65536),
        (HEALTH + b"x: ", b"a" * 65536),
        (HEALTH, b"a: b\r\n" * 10_000),
        (b"", b"\r\n" * 32_768),
        (b"POST /v1/runs HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;", b"e" * 65536),
        (b"POST /v1/runs HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ", b"y" * 65536),
        (b"POST /v1/runs HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 9000),
    ],
    ids=["url", "method", "header", "headers", "lines", "extension", "trailer", "trailers"],
)
def test_a_hundred_megabytes_before_a_body_are_never_read(
    server: RunningServer, begin: bytes, piece: bytes
) -> None:
    """Tried: an URL, a header, trailers … without an end. Stopped by: the limit of a head, before
    the parser stores more than one piece of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    with connect(server) as connection:
        try:
            connection.sendall(begin)
            while sent < 100 * MIB:
                connection.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
    assert sent < 16 * MIB, "it was read"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB
    assert server.api().call("GET", "/v1/health").is_success


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/health?" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
        HEALTH + b"x: " + b"a" * 40_000 + b"\r\n\r\n",
        HEALTH + b"a: b\r\n" * 200 + b"\r\n",
    ],
    ids=["url", "header", "headers"],
)
def test_a_large_head_is_refused_with_a_typed_error(server: RunningServer, head: bytes) -> None:
    """Tried: an URL, a header, or a number of headers above the limit. Stopped by: a typed refusal;
    the connection closes."""
    with connect(server) as connection:
        connection.sendall(head)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert b'"code": "too_large"' in answer
    assert b"connection: close" in answer


def test_pipelined_requests_without_a_response_are_limited(server: RunningServer) -> None:
    """Tried: thousands of requests in one piece, each of which takes memory while it waits for its
    turn. Stopped by: sixteen may wait."""
    with connect(server) as connection:
        connection.sendall((HEALTH + b"\r\n") * 5000)
        assert received(connection).count(b"HTTP/1.1 200") <= 1
    with connect(server) as connection:
        connection.sendall((HEALTH + b"\r\n") * 15 + HEALTH + b"connection: close\r\n\r\n")
        assert received(connection).count(b"HTTP/1.1 200") == 16


@pytest.mark.parametrize(
    ("noise", "has_answer"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", True),
        (b"\x16\x03\x01\x02\x00\x01\x00", False),
        (b"GET / SPDY/9\r\n\r\n", True),
        (b"\r\n" * 50, False),
    ],
)
def test_bytes_that_are_not_http_end_only_their_connection(
    server: RunningServer, noise: bytes, has_answer: bool
) -> None:
    """Tried: TLS, another protocol or empty lines on the server's port. Stopped by: a typed refusal
    that ends this connection only."""
    with connect(server) as connection:
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    if has_answer:
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"code": "invalid_request"' in answer
    assert server.api().call("GET", "/v1/health").is_success
