"""What a person hears of a silent server, and what a poll learns from failing."""

from __future__ import annotations

import itertools

import pytest

from edge_client.transport.outages import Outages
from edge_client.transport.polling import PollWait
from protocol.errors import Unreachable
from protocol.untyped import untyped_error


def test_a_silence_is_told_once_and_its_end_once() -> None:
    told: list[tuple[str, str]] = []
    times = iter([100.0, 130.0])
    outages = Outages(lambda *each: told.append(each), clock=lambda: next(times))
    outages.heard()
    for seconds in (10.0, 20.0, 30.0):
        outages.silent(seconds)
    outages.failed()
    outages.heard()
    outages.heard()
    assert told == [
        ("silence", "no answer from the server for 10 s"),
        ("back", "the server answers again, after 40 s"),
    ]


def test_the_end_of_an_outage_whose_errors_were_shown_is_told() -> None:
    told: list[str] = []
    clock = itertools.count(0.0, 7.0)
    outages = Outages(lambda _kind, message: told.append(message), clock=lambda: next(clock))
    outages.failed()
    outages.failed()
    outages.heard()
    assert told == ["the server answers again, after 7 s"]


GATEWAY = untyped_error(504, "GET /v1/runs/r/assignment", 0)


def test_a_poll_waits_half_as_long_as_an_http_proxy_allowed() -> None:
    wait = PollWait()
    assert wait.bounded(8.0) == 8.0
    wait.failed(GATEWAY, 5.0)
    assert wait.bounded(8.0) == 2.5
    wait.failed(GATEWAY, 1.2)
    assert wait.bounded(8.0) == 1.0


@pytest.mark.parametrize("elapsed", [0.01, 0.9])
def test_a_server_that_is_away_teaches_no_shorter_wait(elapsed: float) -> None:
    wait = PollWait()
    for _ in range(5):
        wait.failed(Unreachable("refused"), elapsed)
    wait.failed(Unreachable("killed in the middle of a poll"), 3.0)
    wait.succeeded()
    wait.failed(Unreachable("killed again"), 4.0)
    assert wait.bounded(8.0) == 8.0


def test_a_connection_that_breaks_twice_in_a_row_while_it_is_silent_shortens_the_wait() -> None:
    wait = PollWait()
    wait.failed(Unreachable("no response within 18 s"), 18.0)
    wait.failed(Unreachable("no response within 18 s"), 6.0)
    assert wait.bounded(8.0) == 3.0
