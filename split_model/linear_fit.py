"""A linear classifier on features: scaled after its closed-form fit, then tuned by convex steps.

A device computes this on its own samples; the server does it for devices that share their labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from split_model.predictions import cross_entropy, softmax
from split_model.predictions import one_hot as one_hot_of

USUAL_FACTOR = 8.0  # factor of the scores, for samples that did not take part in round 0

_CURVATURE = 2.0  # cross-entropy has a curvature of at most 1/2 in each score

# Candidates for the factor of the scores. On a few easy samples the best factor would be far larger
# than on the samples of other devices.
_FACTORS = np.logspace(0, 1.5, 31)

Reals = NDArray[np.floating]

Doubles = NDArray[np.float64]

Floats = NDArray[np.float32]

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Features:
    """The features of a device's samples, and what is known of all devices' features.

    Attributes:
        values: [n, r].
        mean: over all devices' samples, [r].
        variances: over all devices' samples, [r]; 0: an unused component.
        strength: of the ridge regression's penalty, for each sample; 0 before it is solved.
    """

    values: Floats
    mean: Floats
    variances: Floats
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

    weight: Floats
    bias: Floats
    leverage: Floats
    strength: float


def step_classifier(
    weight: Reals, bias: Reals, features: Features, labels: Labels, decay: float
) -> tuple[tuple[Doubles, Doubles], float]:
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
    weight, bias = _doubles(weight, bias)
    mean, values, variances = _doubles(features.mean, features.values, features.variances)
    # A component's factor is the inverse root of its variance here; see the server's basis.
    used = variances > 0
    penalty = np.where(used, decay / np.maximum(variances, 1e-30), 0.0)
    bound = variances / _CURVATURE + penalty  # (r)
    step = np.where(used, 1 / np.maximum(bound, 1e-30), 0.0)
    scores = values @ weight.T + bias  # (n, C)
    loss = cross_entropy(scores, labels)
    errors = softmax(scores) - one_hot_of(labels, len(bias))  # (n, C)
    slope = errors.T @ (values - mean) / len(labels)
    change = (slope + penalty * weight) * step  # (C, r)
    return (weight - change, bias - _CURVATURE * errors.mean(axis=0) + change @ mean), loss


def penalised_loss(
    weight: Reals, bias: Reals, features: Features, labels: Labels, decay: float
) -> float:
    """Return the loss that `step_classifier` lowers: mean cross-entropy, and the penalty.

    Args:
        weight, bias, features, labels, decay: as there.
    """
    weight, bias = _doubles(weight, bias)
    values, variances = _doubles(features.values, features.variances)
    scores = values @ weight.T + bias  # (n, C)
    used = variances > 0
    penalty = float((decay * np.square(weight[:, used]) / variances[used]).sum() / 2)
    return cross_entropy(scores, labels) + penalty


def one_hot_sums(features: Reals, labels: Labels, classes: int) -> tuple[Floats, Floats]:
    """Return the sums [C, r] of the features [n, r] in each class, and their numbers [C]."""
    one_hot = one_hot_of(labels, classes)
    sums = one_hot.T @ features.astype(np.float64)
    return sums.astype(np.float32), one_hot.sum(axis=0).astype(np.float32)


def scale_fit(fit: Fit, features: Reals, labels: Labels) -> tuple[float, float, float]:
    """Choose the factor of the classifier's scores that suits a device's samples.

    Args:
        fit: the classifier.
        features: of the samples, [n, r].
        labels: [n].

    Returns:
        The factor, the leave-one-out cross-entropy in nats, and the penalty of later rounds.
    """
    one_hot = one_hot_of(labels, len(fit.bias))
    scores = leave_one_out(features @ fit.weight.T + fit.bias, one_hot, fit.leverage)
    factor, loss = calibrate(scores, labels)
    return factor, loss, fit.strength / factor * caution(loss, len(fit.bias))


def leave_one_out(scores: Reals, one_hot: Reals, leverage: Reals) -> Doubles:
    """Return the leave-one-out scores [n, C]: those of fits without the sample itself.

    Args:
        scores: scores of the fit on all samples, [n, C].
        one_hot: one-hot labels, [n, C].
        leverage: weight of each sample's label in its own score, [n].
    """
    weight = np.minimum(leverage.astype(np.float64), 1 - 1e-4)[:, None]
    result: Doubles = (scores - weight * one_hot) / (1 - weight)
    return result


def caution(loss: float, classes: int) -> float:
    """Return the share of the ridge regression's penalty in later rounds, 0.1 to 1.

    If the leave-one-out loss is small compared with that of guessing, the labels are consistent,
    and the penalty mainly slows the fit. If it is large, more steps would fit wrong labels.

    Args:
        loss: leave-one-out cross-entropy of round 0, in nats.
        classes: number of classes C; the loss of guessing is ln C.
    """
    return min(1.0, max(0.1, (loss / math.log(classes) - 0.2) / 0.3))


def calibrate(scores: Reals, labels: Labels) -> tuple[float, float]:
    """Return the factor of the scores with the smallest mean cross-entropy, and this loss in nats.

    Args:
        scores: leave-one-out scores, [n, C].
        labels: classes, int64 [n].
    """
    losses = [cross_entropy(factor * scores, labels) for factor in _FACTORS]
    best = min(range(len(losses)), key=losses.__getitem__)
    return float(_FACTORS[best]), losses[best]


def _doubles(*arrays: Reals) -> tuple[Doubles, ...]:
    return tuple(np.asarray(array, np.float64) for array in arrays)
