"""Which updates are too long to count."""

from __future__ import annotations

import math

import pytest
import torch

from split_server.aggregation.norm_bound import Norms, find_excess, measure, norm_of


def changes(*norms: float) -> list[Norms]:
    return [Norms(length, 0.0) for length in norms]


def test_lengths_are_norms_over_all_tensors_of_an_update() -> None:
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]])}
    update = {"a": torch.tensor([4.0, 2.0]), "b": torch.tensor([[4.0]]), "extra": torch.ones(9)}
    assert measure(update, state) == Norms(change=5.0, extras=3.0)
    assert norm_of(state) == math.sqrt(5.0)


def test_an_update_above_the_factor_of_the_median_is_too_large() -> None:
    found = find_excess(changes(1.0, 2.0, 20.1, 3.0, 1.5), state=1.0, factor=10.0, numbers=4)
    assert {at: (each.norm, each.limit) for at, each in found.items()} == {2: (20.1, 20.0)}
    assert find_excess(changes(1.0, 2.0, 20.0, 3.0, 1.5), state=1.0, factor=10.0, numbers=4) == {}


@pytest.mark.parametrize("length", [1e30, 3.4e38, math.inf, math.nan])
def test_no_minority_can_move_the_limit(length: float) -> None:
    for honest, hostile in ((2, 1), (3, 2), (2, 2)):
        found = find_excess(
            changes(*[1.0] * honest, *[length] * hostile), state=1.0, factor=10.0, numbers=4
        )
        assert set(found) == set(range(honest, honest + hostile))


def test_a_change_that_is_negligible_beside_the_state_is_never_refused() -> None:
    assert find_excess(changes(0.0, 0.0, 0.0, 0.9), state=100.0, factor=10.0, numbers=4) == {}
    assert set(find_excess(changes(0.0, 0.0, 0.0, 1.1), state=100.0, factor=10.0, numbers=4)) == {3}


def test_fewer_than_three_updates_have_a_wide_limit_relative_to_the_state() -> None:
    assert find_excess(changes(1.0, 200.0), state=1.0, factor=10.0, numbers=4) == {}
    assert set(find_excess(changes(1.0, 201.0), state=1.0, factor=10.0, numbers=4)) == {1}
    assert find_excess(changes(900.0), state=9.0, factor=10.0, numbers=4) == {}
    assert set(find_excess(changes(1e30), state=0.0, factor=10.0, numbers=4)) == {0}


def test_further_tensors_have_a_limit_of_their_own() -> None:
    norms = [Norms(1.0, 5.0), Norms(1.0, 6.0), Norms(1.0, 1e20)]
    assert set(find_excess(norms, state=1.0, factor=10.0, numbers=4)) == {2}
