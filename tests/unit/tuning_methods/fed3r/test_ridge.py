"""Fed3R's sums and its solution, compared with scikit-learn on pooled features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from split_server.aggregation.fedavg import WeightedState, federated_average
from tuning_methods.fed3r.ridge import RidgeSolution, solve_ridge
from tuning_methods.fed3r.sums import CLASSES, GRAM, FeatureSums, sums_shapes, unpack_gram

WIDTH, NUM_CLASSES, SAMPLES = 24, 4, 60


def samples() -> tuple[Tensor, Tensor]:
    """Features [N, F] with means of their own, and labels [N] of unequally many samples."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, (SAMPLES,), generator=generator).sort().values
    features = torch.randn(SAMPLES, WIDTH, generator=generator) + 2
    return features + F.one_hot(labels, WIDTH), labels


def solve(devices: list[Tensor], strength: float) -> RidgeSolution:
    """Solve from the sums of devices with these positions, as the server does."""
    features, labels = samples()

    def update(positions: Tensor) -> WeightedState:
        sums = FeatureSums(WIDTH, NUM_CLASSES)
        for batch in positions.split(7):
            sums.add(features[batch], labels[batch])
        return WeightedState(len(positions), sums.tensors)

    mean = federated_average(map(update, devices))
    assert {name: tuple(t.shape) for name, t in mean.items()} == sums_shapes(WIDTH, NUM_CLASSES)
    gram = unpack_gram(mean[GRAM], WIDTH + 1)
    return solve_ridge(gram, mean[CLASSES].double(), SAMPLES, strength)


def partitions() -> dict[str, list[Tensor]]:
    labels = samples()[1]
    return {
        "one device": [torch.arange(SAMPLES)],
        "one class each": [torch.nonzero(labels == label)[:, 0] for label in range(NUM_CLASSES)],
        "one sample and the rest": [torch.arange(1), torch.arange(1, SAMPLES)],
    }


@pytest.mark.parametrize("strength", [0.01, 1.0])
@pytest.mark.parametrize("name", partitions())
def test_any_partition_gives_ridge_regression_on_pooled_features(
    name: str, strength: float
) -> None:
    features, labels = samples()
    pooled = features.double().numpy()
    squares = ((pooled - pooled.mean(axis=0)) ** 2).sum() / SAMPLES
    reference = Ridge(alpha=strength * squares).fit(pooled, F.one_hot(labels).double().numpy())
    solution = solve(partitions()[name], strength)
    np.testing.assert_allclose(solution.weight.numpy(), reference.coef_, rtol=0, atol=1e-4)
    np.testing.assert_allclose(solution.bias.numpy(), reference.intercept_, rtol=0, atol=1e-4)


def test_the_strength_has_the_least_error_in_generalised_cross_validation() -> None:
    features, labels = samples()
    targets = F.one_hot(labels).double()
    centred = features.double() - features.double().mean(dim=0)
    squares = float(centred.square().sum() / SAMPLES)

    def error(strength: float) -> float:
        penalised = centred.T @ centred + strength * squares * torch.eye(WIDTH).double()
        hat = centred @ torch.linalg.solve(penalised, centred.T) + 1 / SAMPLES  # with the intercept
        residual = (targets - hat @ targets).square().sum() / SAMPLES
        return float(residual / (1 - hat.trace() / SAMPLES) ** 2)

    chosen = [solve(devices, strength=0).strength for devices in partitions().values()]
    assert len(set(chosen)) == 1, "the partition has no effect"
    candidates = [10 ** (step / 4) for step in range(-8, 9)]
    assert chosen[0] == pytest.approx(min(candidates, key=error))


def test_equal_features_give_the_classes_shares() -> None:
    sums = FeatureSums(3, 2)
    sums.add(torch.ones(4, 3), torch.tensor([0, 0, 0, 1]))
    tensors = sums.tensors()
    gram, classes = unpack_gram(tensors[GRAM], 4), tensors[CLASSES].double()
    solution = solve_ridge(gram, classes, 4, strength=0)
    torch.testing.assert_close(solution.bias, torch.tensor([0.75, 0.25]).double())
    assert not solution.weight.any()
