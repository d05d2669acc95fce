"""Long bodies received directly into their buffer: no byte lost, none counted twice."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from protocol.errors import Busy
from split_server.http.body import read_body
from split_server.http.budget import BodyBudget
from split_server.http.connection import SOCKET_KEY, MeteredProtocol
from split_server.http.errors import send_error, send_pieces
from tests.support.federation import busy_error

ROOM = 4_000_000

LENGTHS = (0, 1, 65_535, 65_536, 65_537, 300_000, 1_500_000, 3_000_000)


@dataclass
class Digests:
    """Answers each body with its digest and the connection's byte count."""

    budget: BodyBudget = field(default_factory=lambda: BodyBudget(ROOM, busy_error))
    gone: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": (await receive())["type"] + ".complete"})
            return
        try:
            with self.budget.reserve() as reservation:
                body = await read_body(scope, receive, 10**8, 20, reservation)
        except Busy as error:
            await send_error(send, error)
            return
        except ClientDisconnect:
            self.gone.set()
            return
        counted = scope["state"][SOCKET_KEY].take()[0]
        answer = f"{hashlib.sha256(body).hexdigest()} {counted}".encode()
        await send_pieces(send, 200, b"text/plain", [answer])


@dataclass
class Place:
    """A running server of `Digests`, and its address."""

    app: Digests
    port: int
    trust: ssl.SSLContext | None

    def connect(self) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        if self.trust is None:
            return plain
        return self.trust.wrap_socket(plain, server_hostname="localhost")


@pytest.fixture(
    scope="module",
    params=[("asyncio", False), ("uvloop", False), ("asyncio", True), ("uvloop", True)],
)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    loop, secure = request.param
    trust, files = None, {}
    if secure:
        trust, files = _certificates(tmp_path_factory.mktemp("tls"))
    app = Digests()
    config = uvicorn.Config(
        app, port=0, loop=loop, http=MeteredProtocol, log_config=None, ws="none", **files
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Place(app, server.servers[0].sockets[0].getsockname()[1], trust)
    server.should_exit = True
    thread.join(20)


def _certificates(folder: Path) -> tuple[ssl.SSLContext, dict[str, str]]:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain, key = folder / "chain.pem", folder / "key.pem"
    certificate.private_key_pem.write_to_path(str(key))
    for place, pem in enumerate(certificate.cert_chain_pems):
        pem.write_to_path(str(chain), append=place > 0)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return trust, {"ssl_certfile": str(chain), "ssl_keyfile": str(key)}


def request_of(body: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def expected(body: bytes) -> str:
    return f"{hashlib.sha256(body).hexdigest()} {len(request_of(body))}"


def read_answer(connection: socket.socket) -> tuple[int, str]:
    """Read exactly one response; return its status and text."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        assert byte, "the server hung up"
        head += byte
    fields = dict(line.split(b": ") for line in head.split(b"\r\n")[1:-2])
    text = b""
    while len(text) < int(fields[b"content-length"]):
        text += connection.recv(int(fields[b"content-length"]) - len(text))
    return int(head.split()[1]), text.decode()


def test_bodies_of_any_length_come_whole_one_after_the_other(place: Place) -> None:
    rng = random.Random(1)
    with place.connect() as connection:
        for length in (*LENGTHS, *reversed(LENGTHS)):
            body = rng.randbytes(length)
            connection.sendall(request_of(body))
            assert read_answer(connection) == (200, expected(body))


def test_bodies_in_small_pieces_come_whole(place: Place) -> None:
    body = random.Random(2).randbytes(400_000)
    message = request_of(body)
    with place.connect() as connection:
        for start in range(0, len(message), 30_011):
            connection.sendall(message[start : start + 30_011])
            time.sleep(0.005)
        assert read_answer(connection) == (200, expected(body))


def test_bytes_after_a_long_body_are_the_next_request(place: Place) -> None:
    bodies = [random.Random(seed).randbytes(700_000) for seed in range(3)]
    with place.connect() as connection:
        connection.sendall(b"".join(map(request_of, bodies)))
        answers = [read_answer(connection) for _ in bodies]
    assert [text.split()[0] for _, text in answers] == [expected(one).split()[0] for one in bodies]


def test_a_body_refused_half_way_leaves_the_connection_in_order(place: Place) -> None:
    body, next_ = bytes(3_000_000), random.Random(3).randbytes(500_000)
    with place.app.budget.reserve() as other, place.connect() as connection:
        other.add(ROOM - 1_000_000)
        # One after the other: a TLS connection is not to be sent through and read at once.
        connection.sendall(request_of(body))
        status, text = read_answer(connection)
        assert (status, place.app.budget.taken) == (503, ROOM - 1_000_000), text
        connection.sendall(request_of(next_))
        status, text = read_answer(connection)
        assert (status, text.split()[0]) == (200, expected(next_).split()[0])


def test_a_body_refused_at_its_beginning_leaves_the_connection_in_order(place: Place) -> None:
    next_ = random.Random(4).randbytes(500_000)
    with place.connect() as connection:
        with place.app.budget.reserve() as other:
            other.add(ROOM)
            connection.sendall(request_of(bytes(300_000)))
            assert read_answer(connection)[0] == 503
        connection.sendall(request_of(next_))
        status, text = read_answer(connection)
        assert (status, text.split()[0]) == (200, expected(next_).split()[0])


def test_a_disconnect_within_a_long_body_ends_the_request(place: Place) -> None:
    place.app.gone.clear()
    with place.connect() as connection:
        connection.sendall(request_of(bytes(1_000_000))[:500_000])
        time.sleep(0.1)
    assert place.app.gone.wait(10)
    assert place.app.budget.taken == 0


def test_many_connections_do_not_mix(place: Place) -> None:
    def talk(seed: int) -> list[tuple[int, str]]:
        rng, answers = random.Random(seed), []
        with place.connect() as connection:
            for _ in range(6):
                body = rng.randbytes(rng.choice(LENGTHS[:-2]))
                connection.sendall(request_of(body))
                answers.append((read_answer(connection), (200, expected(body))))
        return [answer for answer, right in answers if answer != right]

    async def all_of_them() -> list[list[tuple[int, str]]]:
        return await asyncio.gather(*(asyncio.to_thread(talk, seed) for seed in range(6)))

    assert asyncio.run(all_of_them()) == [[]] * 6
