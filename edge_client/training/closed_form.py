"""The linear tail: fitted in closed form in round 0, then tuned by steps of logistic regression.

In round 0 the server computes the features of all participants' samples, and their second moments.
The device sends the sum of its features in each class. It receives the classifier that the sums of
all devices give, and calibrates its scores on its own samples. It never sends the label of a
sample.

Source: Fed3R (arXiv 2406.01116).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_client.data.image_set import Labels
from edge_client.model import Floats
from edge_client.training.context import Diverged, RoundContext
from edge_client.training.loss import cross_entropy, one_hot, softmax
from edge_client.transport.split_client import Features, Fit, SamplesMissing, SplitPlane
from protocol.messages import MAX_LOSS

_MAX_UPLOADS = 3  # uploads of samples that the server has lost

_USUAL_FACTOR = 8.0  # factor of the scores, if this device did not take part in round 0

_CURVATURE = 2.0  # cross-entropy has a curvature of at most 1/2 in each score

# Candidates for the factor of the scores. On a few easy samples the best factor would be far larger
# than on the samples of other devices.
_FACTORS = np.logspace(0, 1.5, 31)


Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class StartResult:
    """The result of round 0; the fitted tail is in the model.

    Attributes:
        samples: number of samples.
        loss: mean leave-one-out cross-entropy of the samples, in nats.
    """

    samples: int
    loss: float


def fit_start(context: RoundContext, plane: SplitPlane) -> StartResult:
    """Fit the model's tail in closed form on all training samples.

    Args:
        context: the round; its model gets the new tail.
        plane: the split plane of the run.

    Raises:
        StepLost: the server lost its part; start the round again.
        StaleRound: the server closed the round without this participant.
    """
    positions = np.arange(len(context.samples))
    labels = context.samples.images.image_set.labels[positions]
    features = _request_features(context, plane, context.attempt).values  # (n, r)
    fit = _send_sums(context, plane, features, labels)
    cache = context.samples.features
    factor, loss, cache.decay = scale_fit(fit, features, labels)
    cache.fitted = context.attempt, cache.decay
    context.model.set_classifier(factor * fit.weight, factor * fit.bias)
    return StartResult(len(positions), loss)


def tune_classifier(context: RoundContext, plane: SplitPlane) -> float:
    """Move the model's linear tail by steps of logistic regression on all samples' features.

    A step divides the mean gradient in each feature by a bound on the curvature of the loss, so
    that no learning rate is needed. If all devices have the same penalty, the average of one step
    on each device is the step on the pooled data, for any distribution of the classes.

    The loss includes a share of the ridge regression's penalty, see `caution`. With the whole
    penalty the classifier of round 0 is nearly optimal, and wrong labels change it little. Each
    device computes its share in round 0; one that was not there uses a usual value.

    Returns:
        The mean cross-entropy before the last step, in nats.

    Raises:
        Diverged: the loss is not finite.
        StaleRound: the server closed the round without this participant.

    Source: Böhning, Multinomial logistic regression algorithm (1992), with a diagonal bound.
    """
    features = _known_features(context, plane)
    labels = context.samples.images.image_set.labels[: len(features.values)]
    steps = context.run.training.local_epochs
    weight, bias = _doubles(*context.model.classifier)
    loss = 0.0
    for step in range(steps):
        decay = context.samples.features.decay
        (weight, bias), loss = step_classifier(weight, bias, features, labels, decay)
        context.advance("local", step + 1, steps)
    context.model.set_classifier(weight, bias)
    return loss


def step_classifier(
    weight: Doubles, bias: Doubles, features: Features, labels: Labels, decay: float
) -> tuple[tuple[Doubles, Doubles], float]:
    """Take one step of penalised logistic regression, see `tune_classifier`.

    Args:
        weight: of the tail, [C, r].
        bias: [C].
        features: of the samples.
        labels: [n].
        decay: strength of the penalty.

    Returns:
        The new weight and bias, float64, and the mean cross-entropy before the step.

    Raises:
        Diverged: the loss is not finite.
    """
    mean, values, variances = _doubles(features.mean, features.values, features.variances)
    # A component's factor is the inverse root of its variance here; see the server's basis.
    used = variances > 0
    penalty = np.where(used, decay / np.maximum(variances, 1e-30), 0.0)
    bound = variances / _CURVATURE + penalty  # (r)
    step = np.where(used, 1 / np.maximum(bound, 1e-30), 0.0)
    scores = values @ weight.T + bias  # (n, C)
    loss = cross_entropy(scores, labels)
    if not 0 <= loss <= MAX_LOSS:
        raise Diverged(f"the local update has diverged: its loss is {loss:g}")
    errors = softmax(scores) - one_hot(labels, len(bias))  # (n, C)
    slope = errors.T @ (values - mean) / len(labels)
    change = (slope + penalty * weight) * step  # (C, r)
    return (weight - change, bias - _CURVATURE * errors.mean(axis=0) + change @ mean), loss


def classifier_loss(context: RoundContext, plane: SplitPlane) -> float:
    """Return the loss that `tune_classifier` lowers: mean cross-entropy, and the penalty.

    A device that has no features, because it has restarted, requests them.

    Raises:
        StaleRound: the round's evaluation is over.
    """
    features, cache = _known_features(context, plane), context.samples.features
    weight, bias = _doubles(*context.model.classifier)
    values, variances = _doubles(features.values, features.variances)
    labels = context.samples.images.image_set.labels[: len(features.values)]
    scores = values @ weight.T + bias  # (n, C)
    used = variances > 0
    penalty = float((cache.decay * np.square(weight[:, used]) / variances[used]).sum() / 2)
    return cross_entropy(scores, labels) + penalty


def _known_features(context: RoundContext, plane: SplitPlane) -> Features:
    """Return the features of round 0; request them if this device has none of that attempt."""
    cache = context.samples.features
    if cache.features is None or cache.attempt != context.start_attempt:
        features = _request_features(context, plane, context.start_attempt)
        # The server checks each update against the device's sums; it has lost them or has none.
        labels = context.samples.images.image_set.labels[: len(features.values)]
        _send_sums(context, plane, features.values, labels)
        return features
    return cache.features


def _send_sums(context: RoundContext, plane: SplitPlane, features: Floats, labels: Labels) -> Fit:
    """Send the sums of the features [n, r] in each class, and their number."""
    rows = one_hot(labels, context.run.model.num_classes)  # (n, C)
    sums = (rows.T @ features.astype(np.float64)).astype(np.float32)
    counts = rows.sum(axis=0).astype(np.float32)
    return plane.solve(sums, counts, context.attempt, len(features), context.round)


def _request_features(context: RoundContext, plane: SplitPlane, basis: int | None) -> Features:
    """Request the features of all samples, and upload samples that the server lacks.

    Args:
        context: the round.
        plane: the split plane of the run.
        basis: attempt at round 0 in whose basis the features are.
    """
    samples = context.samples
    if samples.uploader is None:
        raise ValueError("a closed-form start needs the server's sample cache")
    positions = np.arange(len(samples))
    samples.uploader.ensure(positions)
    ids = samples.uploader.ids(positions)
    for _ in range(_MAX_UPLOADS):
        try:
            features = plane.start(ids, context.round, context.attempt)
            break
        except SamplesMissing as error:
            samples.uploader.send(positions[error.places])
    else:
        features = plane.start(ids, context.round, context.attempt)
    cache = samples.features
    cache.features, cache.attempt = features, basis
    fitted_in, decay = cache.fitted or (None, 0.0)
    cache.decay = decay if fitted_in == basis else features.strength / _USUAL_FACTOR
    return features


def scale_fit(fit: Fit, features: Floats, labels: Labels) -> tuple[float, float, float]:
    """Choose the factor of the classifier's scores that suits a device's samples.

    Args:
        fit: the classifier.
        features: of the samples, [n, r].
        labels: [n].

    Returns:
        The factor, the leave-one-out cross-entropy in nats, and the penalty of later rounds.
    """
    scores = leave_one_out(
        features @ fit.weight.T + fit.bias, one_hot(labels, len(fit.bias)), fit.leverage
    )
    factor, loss = calibrate(scores, labels)
    return factor, loss, fit.strength / factor * caution(loss, len(fit.bias))


def leave_one_out(
    scores: NDArray[np.floating], rows: NDArray[np.floating], leverage: NDArray[np.floating]
) -> Doubles:
    """Return the leave-one-out scores [n, C]: those of fits without the sample itself.

    Args:
        scores: scores of the fit on all samples, [n, C].
        rows: one-hot labels, [n, C].
        leverage: weight of each sample's label in its own score, [n].
    """
    weight = np.minimum(leverage.astype(np.float64), 1 - 1e-4)[:, None]
    result: Doubles = (scores - weight * rows) / (1 - weight)
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


def calibrate(scores: NDArray[np.floating], labels: Labels) -> tuple[float, float]:
    """Return the factor of the scores with the smallest mean cross-entropy, and this loss in nats.

    Args:
        scores: leave-one-out scores, [n, C].
        labels: classes, int64 [n].
    """
    losses = [cross_entropy(factor * scores, labels) for factor in _FACTORS]
    best = min(range(len(losses)), key=losses.__getitem__)
    return float(_FACTORS[best]), losses[best]


def _doubles(*arrays: NDArray[np.floating]) -> tuple[Doubles, ...]:
    return tuple(np.asarray(array, np.float64) for array in arrays)
