"""The proxy does to a request what its fault says, once, and forwards all others as they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from sfprompt_bench.chaos.faults import Fault, Kind
from sfprompt_bench.chaos.proxy import Proxy

BODY = b"0123456789" * 20


class Origin(BaseHTTPRequestHandler):
    """Answers each request with its own body."""

    protocol_version = "HTTP/1.1"
    received: list[bytes] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append(body)
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class Observer:
    """Records what the proxy reports."""

    def __init__(self) -> None:
        self.injected: list[Fault] = []
        self.retries: list[Fault | None] = []

    def inject(self, fault: Fault, device: str) -> None:
        self.injected.append(fault)

    def retried(self, fault: Fault | None, device: str) -> None:
        self.retries.append(fault)

    def refused(self, fault: Fault | None, device: str, status: int) -> None: ...


@pytest.fixture
def origin() -> Iterator[ThreadingHTTPServer]:
    Origin.received = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send_twice(origin: ThreadingHTTPServer, kind: Kind) -> tuple[list[bytes | None], Observer]:
    """Send two requests, the first with a fault; return the responses, None: none."""
    fault = Fault(kind, "update", 1, seconds=0.05, share=0.9, draw=12345)
    observer = Observer()
    proxy = Proxy(origin.server_address[1], [fault], observer)
    url = f"http://127.0.0.1:{proxy.listen('device-1')}/v1/runs/r1/update"
    responses: list[bytes | None] = []
    try:
        for _ in range(2):
            try:
                with httpx.Client(trust_env=False, timeout=5) as client:
                    responses.append(client.post(url, content=BODY).content)
            except httpx.TransportError:
                responses.append(None)
        time.sleep(0.15)  # for a late copy
    finally:
        proxy.close()
    assert observer.injected == [fault]
    assert proxy.counts == {"update": 2}
    return responses, observer


@pytest.mark.parametrize("kind", [Kind.DELAY_REQUEST, Kind.DELAY_RESPONSE, Kind.FRAGMENT])
def test_a_slow_request_arrives_whole(origin: ThreadingHTTPServer, kind: Kind) -> None:
    responses, observer = send_twice(origin, kind)
    assert responses == [BODY, BODY]
    assert Origin.received == [BODY, BODY]
    assert not observer.retries


@pytest.mark.parametrize("kind", [Kind.DUPLICATE, Kind.REPLAY])
def test_a_copy_of_a_request_reaches_the_server(origin: ThreadingHTTPServer, kind: Kind) -> None:
    responses, _ = send_twice(origin, kind)
    assert responses == [BODY, BODY]
    assert Origin.received == [BODY] * 3


@pytest.mark.parametrize(
    ("kind", "arrivals"),
    [
        (Kind.DROP_REQUEST, 1),
        (Kind.DROP_RESPONSE, 2),
        (Kind.TRUNCATE_RESPONSE, 2),
        (Kind.RESET_RESPONSE, 2),
    ],
)
def test_a_broken_request_gets_no_response_and_its_repeat_is_noticed(
    origin: ThreadingHTTPServer, kind: Kind, arrivals: int
) -> None:
    responses, observer = send_twice(origin, kind)
    assert responses == [None, BODY]
    assert Origin.received == [BODY] * arrivals
    assert observer.retries == observer.injected


def test_a_damaged_request_arrives_with_one_other_byte(origin: ThreadingHTTPServer) -> None:
    send_twice(origin, Kind.CORRUPT_REQUEST)
    damaged, whole = Origin.received
    assert whole == BODY
    assert len(damaged) == len(BODY)
    assert sum(a != b for a, b in zip(damaged, BODY, strict=True)) == 1
