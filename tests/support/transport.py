"""Doubles for tests of the metered transport: clients, byte counts, servers that disconnect."""

import ssl
import threading
from collections.abc import Callable, Iterator

import httpx
import trustme

from edge_client.transport.http_transport import MeteredTransport
from tests.support.edge import Connection, response


def client_of(transport: MeteredTransport, timeout: float = 5) -> httpx.Client:
    return httpx.Client(transport=transport, timeout=timeout, trust_env=False)


def counted(transport: MeteredTransport) -> tuple[int, int]:
    traffic = transport.traffic()
    return sum(traffic.up.values()), sum(traffic.down.values())


class Pieces:
    def __init__(self, *pieces: bytes) -> None:
        self.pieces = [memoryview(piece) for piece in pieces]

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self.pieces)


class Forgetful:
    """A server that closes each connection after one response, each time in another way."""

    def __init__(self, *ends: Callable[[Connection], None]) -> None:
        self.ends = list(ends)
        self.answered, self.ended = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, connection: Connection) -> None:
        request = connection.request()
        assert request is not None
        connection.send(response(request.body))
        self.answered.acquire(timeout=5)  # else a reset could arrive before the response
        if self.ends:
            self.ends.pop()(connection)
        self.ended.release()

    def talk_to(self, client: httpx.Client, url: str) -> None:
        for number in range(len(self.ends) + 1):
            body = str(number).encode() * 100_000
            content, headers = Pieces(body[:1], body[1:]), {"content-length": "100000"}
            assert client.put(url, content=content, headers=headers).content == body
            self.answered.release()
            self.ended.acquire(timeout=5)


def server_side(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(context)
    return context
