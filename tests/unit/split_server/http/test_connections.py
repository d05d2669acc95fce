"""The limits of connections: who gives way to whom."""

from __future__ import annotations

import pytest

from split_server.federation.credentials import (
    Anonymous,
    Identity,
    JoinTokenHolder,
    Operator,
    ParticipantIdentity,
)
from split_server.http.connections import ConnectionLimits, ConnectionTable

LIMITS = ConnectionLimits(
    total=12, per_address=4, per_participant=2, first_request_s=10, idle_s=120
)

P, Q = ParticipantIdentity("r1", "p0001"), ParticipantIdentity("r1", "p0002")


class Client:
    def __init__(self) -> None:
        self.closed = False

    def give_up(self) -> None:
        self.closed = True


class Bench:
    """A table with a clock that the test moves."""

    def __init__(self, limits: ConnectionLimits = LIMITS) -> None:
        self.now = 0.0
        self.table = ConnectionTable(limits, lambda: self.now)

    def connect(self, address: str = "10.0.0.1", age: float = 2.0) -> Client:
        client = Client()
        assert self.table.connect(client, address)
        self.now += age
        return client

    def known(self, identity: Identity, *, busy: bool = False) -> Client:
        client = self.connect("10.0.0.9", age=0.1)
        assert self.table.identify(client, identity)
        if not busy:
            self.table.wait(client)
        return client


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_above_the_limit_of_an_address_its_longest_idle_connection_is_closed(bench: Bench) -> None:
    clients = [bench.connect() for _ in range(6)]
    assert [client.closed for client in clients] == [True, True, False, False, False, False]
    assert not bench.connect("10.0.0.2").closed
    assert len(bench.table) == 5


def test_a_connection_that_has_just_answered_is_not_the_longest_idle(bench: Bench) -> None:
    first, second, *_ = [bench.connect() for _ in range(4)]
    bench.table.begin(first)
    bench.table.wait(first)
    bench.connect()
    assert (first.closed, second.closed) == (False, True)


def test_new_connections_have_a_second_for_their_first_request(bench: Bench) -> None:
    burst = [bench.connect(age=0.01) for _ in range(8)]
    assert not any(client.closed for client in burst)
    bench.now += 1.0
    bench.table.sweep()
    assert sum(client.closed for client in burst) == 4


def test_one_address_is_refused_while_all_its_connections_have_requests(bench: Bench) -> None:
    for _ in range(4):
        bench.table.begin(bench.connect())
    assert not bench.table.connect(Client(), "10.0.0.1")
    assert bench.table.connect(Client(), "10.0.0.2")


def test_unknown_connections_leave_room_for_known_ones(bench: Bench) -> None:
    strangers = [bench.connect(f"10.0.1.{number % 5}") for number in range(40)]
    assert sum(not client.closed for client in strangers) == 9  # three quarters of twelve
    members = [bench.known(ParticipantIdentity("r1", f"p{number}")) for number in range(6)]
    assert not any(client.closed for client in members)
    assert len(bench.table) <= 12


def test_idle_known_connections_give_way_before_a_new_one_is_refused(bench: Bench) -> None:
    members = [bench.known(ParticipantIdentity("r1", f"p{number}")) for number in range(12)]
    assert bench.table.connect(Client(), "10.0.0.1")
    assert sum(client.closed for client in members) == 1


def test_nobody_gives_way_while_all_have_requests(bench: Bench) -> None:
    for number in range(12):
        bench.known(ParticipantIdentity("r1", f"p{number}"), busy=True)
    assert not bench.table.connect(Client(), "10.0.0.1")


def test_a_participant_takes_room_from_itself_alone(bench: Bench) -> None:
    other = bench.known(Q)
    first, second, third = [bench.known(P) for _ in range(3)]
    assert [c.closed for c in (first, second, third, other)] == [True, False, False, False]
    for client in (second, third):
        bench.table.identify(client, P)
    fourth = bench.connect()
    assert not bench.table.identify(fourth, P)


def test_the_operator_has_no_limit_of_its_own(bench: Bench) -> None:
    assert not any(bench.known(Operator(), busy=True).closed for _ in range(8))


@pytest.mark.parametrize("identity", [Anonymous(sent_credential=True), JoinTokenHolder()])
def test_without_a_valid_credential_a_connection_stays_unknown(
    bench: Bench, identity: Identity
) -> None:
    client = bench.connect()
    assert bench.table.identify(client, identity)
    assert bench.table.unknown == 1


def test_the_first_request_has_ten_seconds_and_a_later_one_two_minutes(bench: Bench) -> None:
    silent, used, member = bench.connect(), bench.connect(), bench.known(P)
    bench.table.begin(used)
    bench.table.wait(used)
    bench.now += 10
    bench.table.sweep()
    assert [client.closed for client in (silent, used, member)] == [True, False, False]
    bench.now += 110
    bench.table.sweep()
    assert [client.closed for client in (used, member)] == [True, True]
    assert len(bench.table) == 0


def test_a_connection_with_a_request_in_progress_is_never_closed(bench: Bench) -> None:
    client = bench.connect()
    bench.table.begin(client)
    bench.now += 10_000
    bench.table.sweep()
    assert not client.closed


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("", "", True),
    ],
)
def test_an_ipv6_network_is_one_address(first: str, second: str, same: bool) -> None:
    bench = Bench(ConnectionLimits(100, 1, 2, 10, 120))
    client = bench.connect(first)
    bench.connect(second)
    assert client.closed == same
