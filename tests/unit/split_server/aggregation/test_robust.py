"""Aggregation rules against references in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from protocol.federation import FederationSettings
from split_server.aggregation import robust
from split_server.aggregation.fedavg import WeightedState
from split_server.aggregation.rules import aggregate


def states(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 4), "b": (3,)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def stacked(updates: list[dict[str, Tensor]], name: str) -> np.ndarray:
    return np.stack([update[name].numpy() for update in updates]).astype(np.float64)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_median_is_numpys(count: int) -> None:
    updates = states(count)
    found = robust.median(updates)
    for name in ("w", "b"):
        np.testing.assert_allclose(found[name], np.median(stacked(updates, name), axis=0), 1e-6)


def test_the_trimmed_mean_leaves_out_the_least_and_the_greatest() -> None:
    updates = states(7)
    found = robust.trimmed_mean(updates, 2)
    for name in ("w", "b"):
        reference = np.sort(stacked(updates, name), axis=0)[2:5].mean(axis=0)
        np.testing.assert_allclose(found[name], reference, 1e-5)
    middle = robust.trimmed_mean(updates, 100)  # never all of them
    np.testing.assert_allclose(middle["b"], np.median(stacked(updates, "b"), axis=0), 1e-6)


def test_krum_orders_updates_by_their_distances_to_their_nearest_neighbours() -> None:
    updates, hostile = states(7), 2
    flat = np.concatenate([stacked(updates, name).reshape(7, -1) for name in ("w", "b")], axis=1)
    distances = ((flat[:, None] - flat[None]) ** 2).sum(axis=2)
    scores = np.sort(distances, axis=1)[:, 1 : 1 + 7 - hostile - 2].sum(axis=1)
    assert robust.krum(updates, hostile) == list(np.argsort(scores, kind="stable"))


def settings(rule: str, share: float = 0.2) -> FederationSettings:
    return FederationSettings.model_validate({"aggregation": rule, "hostile_share": share})


def weighted(updates: list[dict[str, Tensor]], samples: int = 5) -> list[WeightedState]:
    return [WeightedState(samples, lambda update=update: update) for update in updates]


RULES = ["fedavg", "median", "trimmed-mean", "krum", "multi-krum"]


@pytest.mark.parametrize("rule", RULES)
def test_equal_updates_are_the_result_of_every_rule(rule: str) -> None:
    (update,) = states(1)
    for count in (1, 2, 3, 6):
        result = aggregate(settings(rule), weighted([update] * count)).tensors
        assert all(torch.equal(result[name], update[name]) for name in update)


@pytest.mark.parametrize("rule", RULES[1:])
def test_one_of_five_does_not_decide(rule: str) -> None:
    honest = [{"w": 1.0 + 0.01 * update["w"]} for update in states(4)]
    hostile = {"w": torch.full((3, 4), -9.0)}
    result = aggregate(settings(rule), weighted([*honest[:2], hostile, *honest[2:]]))
    assert float((result.tensors["w"] - 1).abs().max()) < 0.05
    assert (2 in result.left_out) == ("krum" in rule)


def test_multi_krum_averages_the_others_by_their_samples() -> None:
    updates = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 100.0, 3.0)]
    samples = [1, 1, 50, 2]
    result = aggregate(
        settings("multi-krum", 0.25),
        [WeightedState(n, lambda u=u: u) for n, u in zip(samples, updates, strict=True)],
    )
    assert result.left_out == (2,)
    assert result.tensors["w"].item() == 9.0 / 4


def test_the_number_of_hostile_ones_is_rounded_up() -> None:
    assert [robust.count_hostile(0.2, count) for count in (1, 4, 5, 6, 10)] == [1, 1, 1, 2, 2]
    assert robust.count_hostile(0.0, 10) == 0


def test_differential_privacy_needs_the_mean() -> None:
    with pytest.raises(ValueError, match="dp_clip"):
        FederationSettings(aggregation="median", dp_clip=1.0)
