"""Linear discriminant analysis with shrinkage, also for many more features than samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RELATIVE_ZERO = 1e-10  # of the largest eigenvalue: smaller ones are rounding


@dataclass(frozen=True)
class ShrunkLDA:
    """Class means and the spectrum of the covariance within classes, for any shrinkage.

    scikit-learn's solvers factorise [D, D] matrices anew for each class and each shrinkage, which
    takes minutes for thousands of features. One decomposition here serves all shrinkages. With
    fewer samples than features it is one of an [N, N] matrix.

    Attributes:
        classes: the labels of the classes with samples, [C].
        means: of each class, [C, D].
        log_priors: logarithms of the classes' shares of the samples, [C].
        variances: eigenvalues of the covariance within classes above 0, [R].
        directions: their eigenvectors, [D, R].
    """

    classes: Tensor
    means: Tensor
    log_priors: Tensor
    variances: Tensor
    directions: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> ShrunkLDA:
        """Fit means and spectrum to features [N, D] in float64 and labels [N]."""
        classes, members = labels.unique(return_inverse=True)
        counts = torch.bincount(members).double()
        sums = features.new_zeros(len(classes), features.shape[1]).index_add_(0, members, features)
        means = sums / counts[:, None]
        variances, directions = _spectrum(features - means[members])
        return cls(classes, means, (counts / len(labels)).log(), variances, directions)

    def weights(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Calculate the weights [D, C] and biases [C] of the classes' scores.

        The covariance is ``(1 - shrinkage)`` times the one within classes, plus ``shrinkage`` times
        its mean variance on the diagonal, as in scikit-learn.

        Args:
            shrinkage: above 0, at most 1.
        """
        width = self.means.shape[1]
        floor = shrinkage * self.variances.sum().clamp(min=torch.finfo().tiny) / width
        inside = 1 / ((1 - shrinkage) * self.variances + floor) - 1 / floor  # [R]
        projected = self.directions.T @ self.means.T  # [R, C]
        weights = self.means.T / floor + self.directions @ (inside[:, None] * projected)
        biases = self.log_priors - (self.means.T * weights).sum(dim=0) / 2
        return weights, biases

    def count_correct(self, features: Tensor, labels: Tensor, shrinkage: float) -> int:
        """Count the samples, [N, D] with labels [N], that are classified correctly."""
        weights, biases = self.weights(shrinkage)
        best = (features @ weights + biases).argmax(dim=1)
        return int((self.classes[best] == labels).sum())


def choose_shrinkage(
    features: Tensor, labels: Tensor, candidates: Sequence[float], folds: int
) -> float:
    """Choose the shrinkage with the highest accuracy in cross-validation.

    Args:
        features: [N, D] in float64.
        labels: [N].
        candidates: ascending; of equally good ones, the largest is chosen.
        folds: at least 2; each has about the same share of each class.
    """
    place = torch.empty_like(labels)
    place[labels.argsort(stable=True)] = torch.arange(len(labels))
    fold = place % folds
    correct = dict.fromkeys(candidates, 0)
    for held_out in range(folds):
        test, train = fold == held_out, fold != held_out
        if not (test.any() and train.any()):
            continue
        fitted = ShrunkLDA.of(features[train], labels[train])
        for shrinkage in candidates:
            correct[shrinkage] += fitted.count_correct(features[test], labels[test], shrinkage)
    return max(candidates, key=lambda shrinkage: (correct[shrinkage], shrinkage))


def _spectrum(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [R] above 0 and eigenvectors [D, R] of the covariance of residuals [N, D]."""
    samples, width = residuals.shape
    if samples < width:
        variances, vectors = torch.linalg.eigh(residuals @ residuals.T / samples)
    else:
        variances, vectors = torch.linalg.eigh(residuals.T @ residuals / samples)
    above = variances > _RELATIVE_ZERO * variances[-1].clamp(min=0)
    variances, vectors = variances[above], vectors[:, above]
    if samples < width:
        vectors = residuals.T @ vectors / (samples * variances).sqrt()
    return variances, vectors
