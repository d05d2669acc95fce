"""The metered transport at the end of a simulated line: what an exchange takes."""

import ssl
import threading
import time

import pytest
import trustme

from edge_client.transport.connection import CountingSocket
from edge_client.transport.http_transport import MeteredTransport
from edge_client.transport.link import Line, Link
from tests.support.edge import Connection, RawServer, answering, response
from tests.support.transport import Forgetful, client_of, counted, server_side


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("https", [False, True])
def test_an_exchange_takes_the_time_of_its_bytes_and_round_trips(
    https: bool, authority: trustme.CA
) -> None:
    """A clock that only the link moves: loopback takes no time."""
    link, clock = Link(down_bps=20e6, up_bps=5e6, rtt_s=0.05), Clock()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    transport = MeteredTransport(trusting, link=link)
    transport._line = Line(link, clock=lambda: clock.now, sleep=clock.sleep)
    tls = server_side(authority, "127.0.0.1") if https else None
    with RawServer(answering(lambda r: response(r.body * 3)), tls) as server:
        client = client_of(transport)
        opening = 0.1 if https else 0.05
        for body in (b"", b"x" * 100_000):
            before, (up, down) = clock.now, counted(transport)
            assert client.post(server.url, content=body).content == body * 3
            all_up, all_down = counted(transport)
            assert (all_up, all_down) == (server.received, server.sent)
            bits = 8 * (all_up - up) / 5e6 + 8 * (all_down - down) / 20e6
            assert clock.now - before == pytest.approx(opening + 0.05 + bits)
            opening = 0.0  # kept alive
    transport.close()


def test_a_request_replaced_on_a_new_connection_pays_for_both() -> None:
    link, clock = Link(8e6, 8e6, rtt_s=0.05), Clock()
    transport = MeteredTransport(link=link)
    transport._line = Line(link, clock=lambda: clock.now, sleep=clock.sleep)
    serve = Forgetful(Connection.reset)
    with RawServer(serve) as server:
        serve.talk_to(client_of(transport), server.url)
        assert len(server.connections) == 2
        # Two openings and two exchanges at least, 100 kB each way at 8 Mbit/s.
        assert clock.now >= 2 * (0.05 + 0.05 + 0.1 + 0.1)
    transport.close()


def test_an_exchange_over_a_link_really_takes_that_long_and_little_more() -> None:
    transport = MeteredTransport(link=Link.parse("10mbit/4mbit,60ms"))
    with RawServer(answering(lambda r: response(r.body * 2))) as server:
        client = client_of(transport, timeout=0.2)  # a slow link is no silent server
        started = time.monotonic()
        client.post(server.url, content=bytes(50_000))
        took = time.monotonic() - started
        expected = 0.06 + 0.06 + 8 * server.received / 4e6 + 8 * server.sent / 10e6
        assert expected == pytest.approx(0.3, abs=0.002)  # 0.12, 0.1 and 0.08
        assert expected <= took < expected + 0.2
    transport.close()


def test_the_server_s_time_is_added_to_the_link_s() -> None:
    def answer(_request: object) -> bytes:
        time.sleep(0.1)
        return response(bytes(12_500))

    transport = MeteredTransport(link=Link.parse("1mbit,0ms"))
    with RawServer(answering(answer)) as server:
        started = time.monotonic()
        client_of(transport).post(server.url, content=bytes(12_500))
        took = time.monotonic() - started
        assert 0.1 + 0.1 + 0.1 <= took < 0.5
    transport.close()


def test_connections_share_a_link_one_way_and_not_the_other() -> None:
    took = {}
    transport = MeteredTransport(link=Link.parse("1mbit,0ms"))
    together = threading.Barrier(3)
    with RawServer(answering(lambda r: response(bytes(int(r.target[1:]))))) as server:
        client = client_of(transport)

        def talk(name: str, up: int, down: int) -> None:
            together.wait(5)
            started = time.monotonic()
            client.post(f"{server.url}/{down}", content=bytes(up))
            took[name] = time.monotonic() - started

        work = [("first", 25_000, 0), ("second", 25_000, 0), ("down", 0, 25_000)]
        threads = [threading.Thread(target=talk, args=args) for args in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # 0.2 s each, if they were alone.
    assert 0.4 <= max(took["first"], took["second"]) < 0.6
    assert min(took["first"], took["second"]) > 0.3  # in turns, not one after the other
    assert 0.2 <= took["down"] < 0.35
    transport.close()


def test_without_a_link_the_socket_is_the_plain_one() -> None:
    with RawServer(answering(lambda _: response())) as server:
        transport = MeteredTransport()
        client_of(transport).get(server.url)
        ((connection,),) = transport._idle.values()
        assert type(connection.socket) is CountingSocket
        transport.close()
