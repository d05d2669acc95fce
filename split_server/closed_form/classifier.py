"""Ridge regression on one-hot labels, from sums alone: a classifier without a gradient.

The server knows the features' second moments exactly; a device adds what only it knows, the sum of
its features in each class. The sums are the same for every partition of the data.

Sources: Fed3R (arXiv 2406.01116); generalised cross-validation (Golub, Heath, Wahba 1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRENGTHS = torch.logspace(-5, 3, 33, dtype=torch.float64)  # times the mean variance

# Of the samples. A fit that leaves less has learnt them by heart: cross-validation is then 0 / 0.
_LEAST_FREEDOM = 0.03


@dataclass(frozen=True)
class FeatureSums:
    """Sums over all samples' features as the devices received them.

    Attributes:
        count: number of samples n.
        mean: [r], float64.
        products: centred products, [r, r], float64.
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
    """Scores of the classes, and each sample's influence on its own score.

    Attributes:
        weight: [C, r], float32.
        bias: [C], float32.
        mean: of the features, [r], float64.
        influence: a factor A [r, r] of the inverse products, float64.
        count: number of samples n.
        strength: of the penalty on the squares of the unscaled components' coefficients, beside
            the sum of squared errors.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    influence: Tensor
    count: int
    strength: float

    def leverage(self, features: Tensor) -> Tensor:
        """Return h [B] of training samples' features [B, r]: the weight of a label in its own fit.

        A sample's leave-one-out score is (score - h * label) / (1 - h), without another fit.
        """
        factors = (features.double() - self.mean) @ self.influence
        return 1 / self.count + factors.square().sum(dim=1)


def fit_classifier(
    sums: FeatureSums, class_sums: Tensor, class_counts: Tensor, scale: Tensor
) -> RidgeClassifier:
    """Solve the ridge regression; generalised cross-validation chooses its strength.

    The penalty is on the unscaled components, so that it does not depend on their scale.

    Args:
        sums: of all samples.
        class_sums: sum of the features in each class, [C, r], float64.
        class_counts: number of samples in each class, [C], float64.
        scale: factor of each component, [r]; 0: unused.
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
        targets: the class sums in their eigenvectors, [r, C].
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
        is_fit = freedom > _LEAST_FREEDOM
        errors.append(float(residual / freedom**2) if is_fit else float("inf"))
    best = min(range(len(errors)), key=errors.__getitem__)
    return _STRENGTHS[best] * mean_variance
