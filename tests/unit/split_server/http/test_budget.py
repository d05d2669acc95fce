"""The memory budget of requests: what is counted, and which bodies are cancelled."""

from __future__ import annotations

import pytest

from protocol.errors import Busy
from split_server.http.budget import BodyBudget
from tests.support.federation import FakeClock, busy_error


def test_decoded_tensors_and_expected_responses_are_counted_before_they_exist() -> None:
    budget = BodyBudget(1000, busy_error)
    with budget.reserve() as one, budget.reserve() as other:
        one.add(100)
        one.add_decoded(500)
        one.expect_response(300)
        assert budget.taken == 900
        with pytest.raises(Busy) as caught:
            other.add_decoded(101)
        assert (caught.value.field, caught.value.limit, caught.value.value) == (
            "queue_mib",
            1000,
            1001,
        )
        one.release_decoded()
        assert budget.taken == 400
        other.add_decoded(600)
        one.add_response(50)  # smaller than expected
        assert budget.taken == 750
    assert budget.taken == 0


def test_a_request_that_is_alone_may_exceed_the_budget() -> None:
    budget = BodyBudget(1000, busy_error)
    with budget.reserve() as one:
        one.add(10)
        one.add_decoded(5000)
        one.add_response(5000)
        assert budget.taken == 10_010
    assert budget.taken == 0


def test_a_stalled_body_is_cancelled_and_one_that_moves_is_not() -> None:
    time = FakeClock()
    budget = BodyBudget(1000, busy_error, clock=lambda: time.now)
    cancelled: list[str] = []
    with budget.reserve() as stalled, budget.reserve() as moving, budget.reserve() as new:
        stalled.on_cancel = lambda _: cancelled.append("stalled")
        moving.on_cancel = lambda _: cancelled.append("moving")
        stalled.add(400)
        moving.add(500)
        for _ in range(2):
            time.now += 1.5
            moving._since_progress = 4095
            moving.add(1)
            with pytest.raises(Busy):
                new.add(200)
    assert cancelled == ["stalled"]
    assert budget.taken == 0


def test_bytes_one_at_a_time_are_no_progress() -> None:
    time = FakeClock()
    budget = BodyBudget(1000, busy_error, clock=lambda: time.now)
    with budget.reserve() as slow:
        slow.on_cancel = lambda _: None
        for _ in range(30):
            time.now += 0.1
            slow.add(1)
        assert slow.has_stalled(time.now)
        slow.on_cancel = None  # complete: it is being processed
        assert not slow.has_stalled(time.now)
