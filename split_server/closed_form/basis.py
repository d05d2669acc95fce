"""The basis of a run's features: principal components of the body's outputs at several depths.

The server computes it from all samples, without labels. Features are sent in this basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from split_server.storage.run_files import TAIL_BIAS, TAIL_WEIGHT
from split_server.storage.tensor_files import read_tensors

# Components with less than this share of the largest variance are treated as rounding errors.
_MIN_VARIANCE = 1e-7

# A component of variance v is multiplied by v^(-1/4). The components in one quantisation group then
# have similar sizes, and large components still get more quantisation steps than small ones.
_POWER = -0.25


@dataclass(frozen=True)
class Basis:
    """An affine map from read tokens [B, R, D] to features [B, 1, r], and its transpose.

    Attributes:
        mean: mean of the flattened tokens, [q] with q = R * D.
        vectors: scaled principal components, [q, r]; unused ones are 0.
        scale: factor of each component, [r]; 0 for an unused one.
    """

    mean: Tensor
    vectors: Tensor
    scale: Tensor

    def project(self, tokens: Tensor) -> Tensor:
        """Compute features [B, 1, r] from read tokens [B, R, D]."""
        flat = tokens.flatten(1).to(self.vectors.dtype)
        return ((flat - self.mean) @ self.vectors).unsqueeze(1)

    def project_back(self, gradients: Tensor, width: int) -> Tensor:
        """Compute the gradient of the read tokens [B, R, D] from that of features [B, 1, r].

        Args:
            gradients: gradient of the features, [B, 1, r].
            width: width D of a token.

        Returns:
            The gradient of the read tokens, [B, R, D].
        """
        flat = gradients.flatten(1).to(self.vectors.dtype) @ self.vectors.T  # (B, q)
        return flat.reshape(len(flat), -1, width)

    def without_basis(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state's linear tail without the basis: weights [C, r] become [C, q]."""
        weight = state[TAIL_WEIGHT] @ self.vectors.T  # (C, q)
        return {TAIL_WEIGHT: weight, TAIL_BIAS: state[TAIL_BIAS] - weight @ self.mean}

    def to(self, device: torch.device) -> Basis:
        """Return the basis on a device."""
        return Basis(self.mean.to(device), self.vectors.to(device), self.scale.to(device))


class Moments:
    """The first and second moments of flattened read tokens, in float64.

    Args:
        numbers: q, the number of elements of one sample.

    Attributes:
        count: number of samples.
    """

    def __init__(self, numbers: int) -> None:
        self._shift: Tensor | None = None  # the first batch's mean: small sums keep their digits
        self._total = torch.zeros(numbers, dtype=torch.float64)
        self._products = torch.zeros(numbers, numbers, dtype=torch.float64)
        self.count = 0

    def add(self, flat: Tensor) -> None:
        """Add samples [B, q]. The last digits of the sums depend on the order of the calls."""
        if self._shift is None:
            self._shift = flat.mean(dim=0)
        shifted = flat - self._shift
        self._total += shifted.sum(dim=0, dtype=torch.float64)
        self._products += (shifted.T @ shifted).double()
        self.count += len(flat)

    def mean(self) -> Tensor:
        """Return the mean, [q], float64."""
        shift = 0.0 if self._shift is None else self._shift.double()
        return shift + self._total / max(1, self.count)

    def covariance(self) -> Tensor:
        """Return the covariance, [q, q], float64."""
        count = max(1, self.count)
        mean = self._total / count
        return self._products / count - torch.outer(mean, mean)


def fit_basis(moments: Moments, rank: int, depths: int) -> Basis:
    """Compute the largest principal components of each depth, then those of all depths together.

    The elements are standardised first, since elements of small variance can be as informative as
    those of large variance. Two stages cost far less than one over all elements, with almost the
    same result.

    Args:
        moments: moments of the flattened read tokens, [q].
        rank: number of components r; components beyond the rank of the data are 0.
        depths: number of depths, whose elements follow each other in the q elements.
    """
    covariance = moments.covariance()
    deviations = covariance.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(deviations > 0, 1 / deviations.clamp(min=1e-300), 0.0)
    covariance = inverse[:, None] * covariance * inverse  # of the standardised elements
    numbers = len(covariance)
    block = numbers // depths
    kept = min(block, max(1, -(-2 * rank // depths)))  # of each depth
    stage = torch.zeros(numbers, depths * kept, dtype=torch.float64)
    for depth in range(depths):
        rows = slice(depth * block, (depth + 1) * block)
        _, vectors = torch.linalg.eigh(covariance[rows, rows])
        stage[rows, depth * kept : (depth + 1) * kept] = vectors[:, -kept:]
    values, vectors = torch.linalg.eigh(stage.T @ covariance @ stage)
    values, vectors = values.flip(0)[:rank], stage @ vectors.flip(1)[:, :rank]
    used = values > _MIN_VARIANCE * values[0].clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.zeros(rank, dtype=torch.float64)
    scale[: len(values)] = torch.where(used, values.clamp(min=1e-300) ** _POWER, 0.0)
    scaled = torch.zeros(numbers, rank, dtype=torch.float64)
    fixed = _with_fixed_signs(vectors) * scale[: len(values)]
    scaled[:, : len(values)] = inverse[:, None] * fixed
    return Basis(moments.mean().float(), scaled.float(), scale)


def _with_fixed_signs(vectors: Tensor) -> Tensor:
    """Make the largest element of each column positive: the sign of an eigenvector is arbitrary."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)


@lru_cache(maxsize=16)
def read_basis(path: Path, device: torch.device) -> Basis:
    """Read a run's basis to a device. The result is cached: callers must not change it.

    Raises:
        OSError: the file cannot be read.
    """
    tensors = read_tensors(path)
    return Basis(tensors["mean"], tensors["vectors"], tensors["scale"]).to(device)
