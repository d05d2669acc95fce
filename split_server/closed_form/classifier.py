"""Ridge regression on one-hot labels, computed from sums over all samples.

The server computes the second moments of the features. A device sends the sum of its features in
each class, which only it can compute. The total sums are equal for every partition of the data.

Sources: Fed3R (arXiv 2406.01116); generalised cross-validation (Golub, Heath, Wahba 1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRENGTHS = torch.logspace(-5, 3, 33, dtype=torch.float64)  # times the mean variance

# A fit with a smaller share of residual degrees of freedom interpolates the samples, and
# generalised cross-validation divides 0 by 0.
_MIN_FREEDOM = 0.03


@dataclass(frozen=True)
class FeatureSums:
    """Sums over the features of all samples, as the devices decode them.

    Attributes:
        count: number of samples n.
        mean: mean of the features, [r], float64.
        products: sum of the products of centred features, [r, r], float64.
    """

    count: int
    mean: Tensor
    products: Tensor

    @property
    def variances(self) -> Tensor:
        """The variance of each feature, [r], float64."""
        return self.products.diagonal() / max(1, self.count)


@dataclass(frozen=True)
class RidgeClassifier:
    """A linear classifier, and what `leverage` needs.

    Attributes:
        weight: weights of the scores, [C, r], float32.
        bias: biases of the scores, [C], float32.
        mean: mean of the features, [r], float64.
        influence: matrix A with A A^T the inverse of the penalised products, [r, r], float64.
        count: number of samples n.
        strength: factor of the penalty, the squared coefficients of the unscaled components; the
            loss is the sum of squared errors plus this.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    influence: Tensor
    count: int
    strength: float

    def leverage(self, features: Tensor) -> Tensor:
        """Return the leverage h [B] of training samples: the weight of a label in its own score.

        The leave-one-out score of a sample is (score - h * label) / (1 - h).

        Args:
            features: features of the samples, [B, r].
        """
        factors = (features.double() - self.mean) @ self.influence
        return 1 / self.count + factors.square().sum(dim=1)


def fit_classifier(
    sums: FeatureSums, class_sums: Tensor, class_counts: Tensor, scale: Tensor
) -> RidgeClassifier:
    """Solve the ridge regression; generalised cross-validation chooses the strength.

    The penalty is on the unscaled components, so that it does not depend on their scale.

    Args:
        sums: sums over the features of all samples.
        class_sums: sum of the features in each class, [C, r], float64.
        class_counts: number of samples in each class, [C], float64.
        scale: factor of each component, [r]; 0 for an unused one.
    """
    count, shares = float(class_counts.sum()), class_counts / class_counts.sum()
    unscale = torch.where(scale > 0, 1 / scale.clamp(min=1e-300), 0.0)
    centred = class_sums - class_counts[:, None] * sums.mean  # (C, r)
    products = unscale[:, None] * sums.products * unscale
    values, vectors = torch.linalg.eigh(products)
    values = values.clamp(min=0)
    targets = vectors.T @ (unscale[:, None] * centred.T)  # (r, C)
    variance = float((class_counts * (1 - shares)).sum())
    strength = _choose_strength(values, targets, variance, count)
    inverse = 1 / (values + strength)
    weight = unscale[:, None] * (vectors @ (targets * inverse[:, None]))  # (r, C)
    return RidgeClassifier(
        weight=weight.T.float().contiguous(),
        bias=(shares - sums.mean @ weight).float(),
        mean=sums.mean,
        influence=(unscale[:, None] * vectors) * inverse.sqrt(),
        count=sums.count,
        strength=float(strength),
    )


def _choose_strength(values: Tensor, targets: Tensor, variance: float, count: float) -> Tensor:
    """Return the strength with the smallest generalised cross-validation error.

    Args:
        values: eigenvalues of the products, [r].
        targets: class sums in the basis of the eigenvectors, [r, C].
        variance: sum of squares of the centred labels.
        count: number of samples.
    """
    squares = targets.square().sum(dim=1)  # (r)
    mean_variance = values.sum().clamp(min=1e-12) / count
    errors: list[float] = []
    for factor in _STRENGTHS:
        damped = values + factor * mean_variance
        residual = variance - 2 * (squares / damped).sum() + (squares * values / damped**2).sum()
        freedom = 1 - (1 + (values / damped).sum()) / count
        is_fit = freedom > _MIN_FREEDOM
        errors.append(float(residual / freedom**2) if is_fit else float("inf"))
    best = min(range(len(errors)), key=errors.__getitem__)
    return _STRENGTHS[best] * mean_variance
