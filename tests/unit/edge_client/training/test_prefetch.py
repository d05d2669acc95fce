"""Computing values one item ahead."""

from __future__ import annotations

import threading

import pytest

from edge_client.training.evaluation import prefetch


def test_the_next_request_is_prepared_during_the_current_one() -> None:
    started = [threading.Event() for _ in range(3)]

    def make(number: int) -> int:
        started[number].set()
        return 10 * number

    for number, value in prefetch(range(3), make):
        assert value == 10 * number
        if number < 2:
            assert started[number + 1].wait(20)
        assert not any(event.is_set() for event in started[number + 2 :]), "and no more than that"


@pytest.mark.parametrize("items", [[], [1], [3, 1, 2]])
def test_they_come_in_their_order(items: list[int]) -> None:
    assert list(prefetch(items, str)) == [(item, str(item)) for item in items]


def test_an_error_is_raised_at_its_turn() -> None:
    results = prefetch([2, 1, 0], lambda number: 2 // number)
    assert [next(results), next(results)] == [(2, 1), (1, 2)]
    with pytest.raises(ZeroDivisionError):
        next(results)
