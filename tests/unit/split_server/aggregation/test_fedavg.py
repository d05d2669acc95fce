"""FedAvg: weights, order and errors."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from protocol.errors import EmptyUpdate, NonFinite, WrongShape
from split_server.aggregation.fedavg import WeightedState, federated_average, weighted_mean


def update(samples: int, **tensors: Tensor) -> WeightedState:
    return WeightedState(samples, lambda: tensors)


def test_the_mean_is_weighted_by_samples() -> None:
    mean = federated_average(
        [update(1, w=torch.tensor([0.0, 4.0])), update(3, w=torch.tensor([4.0, 8.0]))]
    )
    assert mean["w"].tolist() == [3.0, 7.0]
    assert mean["w"].dtype is torch.float32


def test_sums_use_float64() -> None:
    tensors = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    mean = federated_average([update(1, w=tensor) for tensor in tensors])
    assert mean["w"].item() == pytest.approx(1 / 3)


def test_the_mean_of_one_update_is_bit_identical() -> None:
    state = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(federated_average([update(37, w=state)])["w"], state)


def test_updates_are_loaded_one_at_a_time() -> None:
    held = 0

    def load() -> dict[str, Tensor]:
        nonlocal held
        held += 1
        return {"w": torch.zeros(1)}

    federated_average(WeightedState(1, load) for _ in range(5))
    assert held == 5


@pytest.mark.parametrize(
    ("updates", "error"),
    [
        ([], EmptyUpdate),
        ([update(0, w=torch.zeros(1))], EmptyUpdate),
        ([update(1, w=torch.zeros(1)), update(1, v=torch.zeros(1))], WrongShape),
        ([update(1, w=torch.zeros(1)), update(1, w=torch.zeros(2))], WrongShape),
        ([update(1, w=torch.tensor([float("nan")]))], NonFinite),
    ],
)
def test_invalid_updates_raise_typed_errors(
    updates: list[WeightedState], error: type[Exception]
) -> None:
    with pytest.raises(error):
        federated_average(updates)


def test_an_empty_tensor_stays_empty() -> None:
    assert federated_average([update(1, w=torch.zeros(0, 3))])["w"].shape == (0, 3)


def test_losses_are_averaged_over_the_updates_with_a_loss() -> None:
    assert weighted_mean([(1.0, 1), (None, 100), (4.0, 2)]) == 3.0
    assert weighted_mean([(None, 1)]) is None
    assert weighted_mean([(1.0, 0)]) is None
    values = [(random.Random(n).random(), n) for n in range(1, 9)]
    assert weighted_mean(values) == weighted_mean(list(values))
