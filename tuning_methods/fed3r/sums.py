"""What a device sends in Fed3R: mean products of its features, with each other and with classes."""

from __future__ import annotations

import torch
from torch import Tensor

GRAM, CLASSES = "gram", "class_sums"  # names of the tensors in an update


def sums_shapes(width: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `FeatureSums.tensors`, by name."""
    rows = width + 1
    return {GRAM: (rows * (rows + 1) // 2,), CLASSES: (rows, num_classes)}


class FeatureSums:
    """Sums over samples, whose means add up over devices if they are weighted by samples.

    A constant 1 follows the features, so that the products also have their means and the classes'
    shares.

    Args:
        width: number of features F.
        num_classes: C.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        self._gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self._classes = torch.zeros(width + 1, num_classes, dtype=torch.float64)
        self._samples = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features [B, F] with labels [B]."""
        rows = torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()
        self._gram += rows.T @ rows
        self._classes.index_add_(1, labels, rows.T)
        self._samples += len(features)

    def tensors(self) -> dict[str, Tensor]:
        """Return the means in float32: the products' upper triangle by rows, and the classes."""
        mean = self._gram / max(1, self._samples)
        upper = mean[tuple(torch.triu_indices(*mean.shape))]
        return {GRAM: upper.float(), CLASSES: (self._classes / max(1, self._samples)).float()}


def unpack_gram(upper: Tensor, rows: int) -> Tensor:
    """Restore the symmetric matrix [rows, rows] in float64 from its upper triangle."""
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    gram[tuple(torch.triu_indices(rows, rows))] = upper.double()
    return gram + gram.T - gram.diagonal().diag()
