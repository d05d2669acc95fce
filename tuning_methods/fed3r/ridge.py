"""Ridge regression on one-hot classes, from mean products of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below, rounding of the products to float32 would decide the cross-validation.
_CANDIDATES = tuple(10 ** (step / 4) for step in range(-8, 9))


@dataclass(frozen=True)
class RidgeSolution:
    """A classifier whose scores estimate the one-hot classes.

    Attributes:
        weight: [C, F].
        bias: [C].
        strength: penalty of the weights, of a sample's mean squared norm.
    """

    weight: Tensor
    bias: Tensor
    strength: float


def solve_ridge(gram: Tensor, classes: Tensor, samples: int, strength: float) -> RidgeSolution:
    """Minimise the squared error plus the penalty; the bias has no penalty.

    Args:
        gram: mean products of the features and a constant 1, [F + 1, F + 1] in float64.
        classes: mean products of the same with the one-hot classes, [F + 1, C] in float64.
        samples: N.
        strength: the penalty on sums over samples, of a sample's mean squared norm around the
            mean; 0: the candidate with the least error in generalised cross-validation.

    Source: Fed3R (arXiv 2406.01116, section 3), with a bias; Golub, Heath and Wahba (1979).
    """
    mean, shares = gram[:-1, -1], classes[-1]
    covariance = gram[:-1, :-1] - mean.outer(mean)
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0)
    projected = directions.T @ (classes[:-1] - mean.outer(shares))  # [F, C]
    unit = float(variances.sum()) / samples or 1.0  # a strength of 1, on means over samples
    if strength == 0:
        error = (shares * (1 - shares)).sum()
        strength = min(
            _CANDIDATES,
            key=lambda each: _validation_error(variances, projected, error, samples, each * unit),
        )
    weight = directions @ (projected / (variances + strength * unit)[:, None])
    return RidgeSolution(weight.T, shares - mean @ weight, strength)


def _validation_error(
    variances: Tensor, projected: Tensor, error: Tensor, samples: int, penalty: float
) -> float:
    """Estimate the mean squared error on new samples.

    Args:
        variances: of the features along the principal directions, [F].
        projected: covariances of the features along them with the classes, [F, C].
        error: mean squared error of constant scores.
        samples: N.
        penalty: on means over samples.
    """
    penalised = variances + penalty
    explained = 2 * projected.square() / penalised[:, None]
    explained -= (variances / penalised.square())[:, None] * projected.square()
    free = 1 - (1 + float((variances / penalised).sum())) / samples
    residual = max(0.0, float(error - explained.sum()))
    return residual / free**2 if free > 0 else float("inf")
