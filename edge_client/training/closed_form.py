"""Round 0: fit the tail in closed form, from sums of this device's features in each class.

The server computes the features of all participants' samples and their second moments. The device
adds the sums, gets the classifier that all devices' sums give, and calibrates its scores on its own
samples. Labels never travel; their sums do.

Source: Fed3R (arXiv 2406.01116).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.training.context import RoundContext
from edge_client.transport.split_client import SamplesMissing, SplitPlane

_MAX_UPLOADS = 3  # of samples that the server has lost

_TEMPERATURES = torch.logspace(0, 2, 41)  # factors of the scores, from 1 to 100


@dataclass(frozen=True)
class StartResult:
    """What a device reports about its start; the fitted tail is in the model.

    Attributes:
        samples: number of samples.
        loss: mean leave-one-out cross-entropy of the samples.
    """

    samples: int
    loss: float


def fit_start(context: RoundContext, plane: SplitPlane) -> StartResult:
    """Fit the model's tail in closed form, on all training samples.

    Raises:
        StepLost: the server lost its part; start the round again.
        StaleRound: the server went on without this participant.
    """
    positions = torch.arange(len(context.samples))
    labels = context.samples.images.image_set.labels[positions]
    features = _features(context, plane, positions)  # (n, r)
    classes = context.run.model.num_classes
    one_hot = F.one_hot(labels, classes).double()  # (n, C)
    sums, counts = one_hot.T @ features.double(), one_hot.sum(dim=0)
    fit = plane.solve(sums.float(), counts.float(), context.attempt, len(positions))
    scores = leave_one_out(features @ fit.weight.T + fit.bias, one_hot.float(), fit.leverage)
    factor, loss = calibrate(scores, labels)
    with torch.no_grad():
        classifier = dict(context.model.tail.named_parameters())
        classifier["trunk.head.weight"].copy_(factor * fit.weight)
        classifier["trunk.head.bias"].copy_(factor * fit.bias)
    return StartResult(len(positions), loss)


def _features(context: RoundContext, plane: SplitPlane, positions: Tensor) -> Tensor:
    """Return the features [n, r] of all samples; uploads what the server lacks."""
    uploader = context.samples.uploader
    if uploader is None:
        raise ValueError("a closed-form start needs the server's sample cache")
    uploader.ensure(positions)
    ids = uploader.ids(positions)
    for _ in range(_MAX_UPLOADS):
        try:
            return plane.start(ids, context.attempt).flatten(1)
        except SamplesMissing as error:
            uploader.send(positions[error.places])
    return plane.start(ids, context.attempt).flatten(1)


def leave_one_out(scores: Tensor, one_hot: Tensor, leverage: Tensor) -> Tensor:
    """Return the scores [n, C] that fits without the sample itself would give.

    Args:
        scores: of the fit on all samples, [n, C].
        one_hot: labels, [n, C].
        leverage: weight of each sample's label in its own fit, [n].
    """
    weight = leverage.clamp(max=1 - 1e-4).unsqueeze(1)
    return (scores - weight * one_hot) / (1 - weight)


def calibrate(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the factor of scores [n, C] with the smallest cross-entropy, and this loss."""
    losses = [F.cross_entropy(factor * scores, labels).item() for factor in _TEMPERATURES]
    best = min(range(len(losses)), key=losses.__getitem__)
    return float(_TEMPERATURES[best]), losses[best]
