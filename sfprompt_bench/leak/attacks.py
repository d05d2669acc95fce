"""Inference of labels from gradients of features, and from sums of features in each class.

Source: Liu et al., *Clustering Label Inference Attack against Practical Split Learning*, arXiv
2203.05222 (the clustering); for the loss, d loss / d logits = softmax - one-hot label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_RESTARTS, _ITERATIONS = 10, 50


def infer_labels(tail: Callable[[Tensor], Tensor], features: Tensor, gradients: Tensor) -> Tensor:
    """Infer the label [N] of each sample by least squares against the tail's Jacobian.

    The gradient of a sample is J^T (p - y), up to a positive factor: J is the Jacobian of its
    logits, p its softmax and y its one-hot label. Only the label's component of p - y is negative.

    Args:
        tail: as the server knows it, computes logits [N, C] of features; the Jacobian of an older
            tail is a little wrong.
        features: that the server sent, [N, T', D].
        gradients: of the loss, that it received, [N, T', D].
    """
    inputs = features.detach().clone().requires_grad_()
    logits = tail(inputs)  # [N, C]
    rows = [
        torch.autograd.grad(logit.sum(), inputs, retain_graph=True)[0].flatten(1)
        for logit in logits.unbind(1)
    ]
    jacobian = torch.stack(rows, dim=2).double()  # [N, T' D, C]
    received = gradients.flatten(1).double().unsqueeze(2)
    residuals: Tensor = torch.linalg.lstsq(jacobian, received).solution  # p - y, [N, C, 1]
    return residuals.squeeze(2).argmin(dim=1)


def infer_from_sums(features: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Infer the labels [N] from the sums of known features in each class, by least squares.

    The sums are linear in the one-hot labels: r equations for each class, and N unknowns.

    Args:
        features: that the server sent, [N, r].
        sums: of the features in each class, [C, r].
        counts: of the samples in each class, [C].
    """
    equations = torch.cat([features, torch.ones(len(features), 1)], dim=1).double().T  # [r + 1, N]
    targets = torch.cat([sums.double(), counts.double().unsqueeze(1)], dim=1).T  # [r + 1, C]
    one_hot: Tensor = torch.linalg.pinv(equations) @ targets  # [N, C]
    return one_hot.argmax(dim=1)


def cluster_directions(gradients: Tensor, clusters: int, seed: int) -> Tensor:
    """Cluster the gradients' directions by spherical k-means; return each one's cluster [N].

    Args:
        gradients: that the server received, [N, T', D].
        clusters: their number, that of the classes.
        seed: of the first centres; the best of ten draws counts.
    """
    directions = F.normalize(gradients.flatten(1).double(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    draws = [_cluster(directions, clusters, generator) for _ in range(_RESTARTS)]
    return max(draws, key=lambda draw: draw[0])[1]


def purity(clusters: Tensor, labels: Tensor) -> float:
    """Return the share of samples with the most frequent label of their cluster.

    It is the share of labels that a server recovers which knows one label of each cluster.
    """
    counts = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1)
    counts.index_put_((clusters, labels), torch.ones(len(labels)), accumulate=True)
    return float(counts.amax(dim=1).sum() / len(labels))


def _cluster(directions: Tensor, clusters: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Return the sum of the cosines to the centres, and the clusters [N], of one draw."""
    centres = _draw_centres(directions, clusters, generator)
    for _ in range(_ITERATIONS):
        nearest = (directions @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
        moved = F.normalize(sums, dim=1)
        empty = sums.norm(dim=1) == 0
        moved[empty] = centres[empty]
        if torch.equal(moved, centres):
            break
        centres = moved
    cosines, nearest = (directions @ centres.T).max(dim=1)
    return float(cosines.sum()), nearest


def _draw_centres(directions: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw centres among the directions, far ones with a higher probability (k-means++)."""
    first = torch.randint(len(directions), (1,), generator=generator)
    centres = directions[first]
    while len(centres) < clusters:
        distances = (1 - (directions @ centres.T).amax(dim=1)).clamp_min(1e-12)
        drawn = torch.multinomial(distances, 1, generator=generator)
        centres = torch.cat([centres, directions[drawn]])
    return centres
