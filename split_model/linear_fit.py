"""A linear classifier on features: scaled after its closed-form fit, then tuned by convex steps.

A device computes this on its own samples; the server does it for devices that share their labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

USUAL_FACTOR = 8.0  # factor of the scores, for samples that did not take part in round 0

_CURVATURE = 2.0  # cross-entropy has a curvature of at most 1/2 in each score

# Candidates for the factor of the scores. On a few easy samples the best factor would be far larger
# than on the samples of other devices.
_TEMPERATURES = torch.logspace(0, 1.5, 31)


@dataclass(frozen=True)
class Features:
    """The features of a device's samples, and what is known of all devices' features.

    Attributes:
        values: [n, r].
        mean: over all devices' samples, [r].
        variances: over all devices' samples, [r]; 0: an unused component.
        strength: of the ridge regression's penalty, for each sample; 0 before it is solved.
    """

    values: Tensor
    mean: Tensor
    variances: Tensor
    strength: float


@dataclass(frozen=True)
class Fit:
    """The classifier of a closed-form start.

    Attributes:
        weight: [C, r].
        bias: [C].
        leverage: weight of each training sample's label in its own score, [n].
        strength: of the penalty, for each sample.
    """

    weight: Tensor
    bias: Tensor
    leverage: Tensor
    strength: float


def step_classifier(
    weight: Tensor, bias: Tensor, features: Features, labels: Tensor, decay: float
) -> tuple[tuple[Tensor, Tensor], float]:
    """Take one step of penalised logistic regression.

    The step divides the mean gradient in each feature by a bound on the curvature of the loss, so
    that no learning rate is needed.

    Args:
        weight: of the tail, [C, r].
        bias: [C].
        features: of the samples.
        labels: [n].
        decay: strength of the penalty.

    Returns:
        The new weight and bias, float64, and the mean cross-entropy before the step.

    Source: Böhning, Multinomial logistic regression algorithm (1992), with a diagonal bound.
    """
    weight, bias = weight.double(), bias.double()
    mean, values, variances = (
        each.double() for each in (features.mean, features.values, features.variances)
    )
    # A component's factor is the inverse root of its variance here; see the server's basis.
    used = variances > 0
    penalty = torch.where(used, decay / variances.clamp(min=1e-30), 0.0)
    bound = variances / _CURVATURE + penalty  # (r)
    step = torch.where(used, 1 / bound.clamp(min=1e-30), 0.0)
    scores = values @ weight.T + bias  # (n, C)
    loss = F.cross_entropy(scores, labels).item()
    errors = scores.softmax(dim=1) - F.one_hot(labels, len(bias)).double()  # (n, C)
    slope = errors.T @ (values - mean) / len(labels)
    change = (slope + penalty * weight) * step  # (C, r)
    return (weight - change, bias - _CURVATURE * errors.mean(dim=0) + change @ mean), loss


def penalised_loss(
    weight: Tensor, bias: Tensor, features: Features, labels: Tensor, decay: float
) -> float:
    """Return the loss that `step_classifier` lowers: mean cross-entropy, and the penalty.

    Args:
        weight, bias, features, labels, decay: as there.
    """
    variances, weight = features.variances.double(), weight.detach().double()
    scores = features.values.double() @ weight.T + bias.detach().double()  # (n, C)
    used = variances > 0
    penalty = float((decay * weight.square()[:, used] / variances[used]).sum() / 2)
    return float(F.cross_entropy(scores, labels)) + penalty


def one_hot_sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the sums [C, r] of the features [n, r] in each class, and their numbers [C]."""
    one_hot = F.one_hot(labels, classes).double()
    return (one_hot.T @ features.double()).float(), one_hot.sum(dim=0).float()


def scale_fit(fit: Fit, features: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Choose the factor of the classifier's scores that suits a device's samples.

    Args:
        fit: the classifier.
        features: of the samples, [n, r].
        labels: [n].

    Returns:
        The factor, the leave-one-out cross-entropy in nats, and the penalty of later rounds.
    """
    one_hot = F.one_hot(labels, len(fit.bias)).float()
    scores = leave_one_out(features @ fit.weight.T + fit.bias, one_hot, fit.leverage)
    factor, loss = calibrate(scores, labels)
    return factor, loss, fit.strength / factor * caution(loss, len(fit.bias))


def leave_one_out(scores: Tensor, one_hot: Tensor, leverage: Tensor) -> Tensor:
    """Return the leave-one-out scores [n, C]: those of fits without the sample itself.

    Args:
        scores: scores of the fit on all samples, [n, C].
        one_hot: one-hot labels, [n, C].
        leverage: weight of each sample's label in its own score, [n].
    """
    weight = leverage.clamp(max=1 - 1e-4).unsqueeze(1)
    return (scores - weight * one_hot) / (1 - weight)


def caution(loss: float, classes: int) -> float:
    """Return the share of the ridge regression's penalty in later rounds, 0.1 to 1.

    If the leave-one-out loss is small compared with that of guessing, the labels are consistent,
    and the penalty mainly slows the fit. If it is large, more steps would fit wrong labels.

    Args:
        loss: leave-one-out cross-entropy of round 0, in nats.
        classes: number of classes C; the loss of guessing is ln C.
    """
    return min(1.0, max(0.1, (loss / math.log(classes) - 0.2) / 0.3))


def calibrate(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the factor of the scores with the smallest mean cross-entropy, and this loss in nats.

    Args:
        scores: leave-one-out scores, [n, C].
        labels: classes, int64 [n].
    """
    losses = [F.cross_entropy(factor * scores, labels).item() for factor in _TEMPERATURES]
    best = min(range(len(losses)), key=losses.__getitem__)
    return float(_TEMPERATURES[best]), losses[best]
