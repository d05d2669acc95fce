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

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.training.context import Diverged, RoundContext
from edge_client.transport.split_client import Features, Fit, SamplesMissing, SplitPlane
from protocol.messages import MAX_LOSS

_MAX_UPLOADS = 3  # uploads of samples that the server has lost

_USUAL_FACTOR = 8.0  # factor of the scores, if this device did not take part in round 0

_CURVATURE = 2.0  # cross-entropy has a curvature of at most 1/2 in each score

# Candidates for the factor of the scores. On a few easy samples the best factor would be far larger
# than on the samples of other devices.
_TEMPERATURES = torch.logspace(0, 1.5, 31)


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
    positions = torch.arange(len(context.samples))
    labels = context.samples.images.image_set.labels[positions]
    features = _request_features(context, plane, context.attempt).values  # (n, r)
    classes = context.run.model.num_classes
    one_hot = F.one_hot(labels, classes).double()  # (n, C)
    fit = _send_sums(context, plane, features, one_hot)
    cache = context.samples.features
    factor, loss, cache.decay = scale_fit(fit, features, labels)
    cache.fitted = context.attempt, cache.decay
    classifier = context.model.tail.trunk.head
    with torch.no_grad():
        classifier.weight.copy_(factor * fit.weight)
        classifier.bias.copy_(factor * fit.bias)
    return StartResult(len(positions), loss)


def tune_classifier(context: RoundContext, plane: SplitPlane) -> float:
    """Move the model's linear tail by steps of logistic regression on all samples' features.

    A step divides the mean gradient in each feature by a bound on the curvature of the loss, so
    that no learning rate is needed. If all devices have the same penalty, the average of one step
    on each device is the step on the pooled data, for any distribution of the classes.

    The loss includes a share of the ridge regression's penalty (see `caution`). With the
    whole penalty, the classifier of round 0 is nearly optimal, and wrong labels change it little. A
    device computes its share in round 0; a device that restarts later uses a default.

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
    tail = context.model.tail.trunk.head
    labels = context.samples.images.image_set.labels[: len(features.values)]
    steps = context.run.training.local_epochs
    result, loss = (tail.weight.detach(), tail.bias.detach()), 0.0
    for step in range(steps):
        result, loss = step_classifier(*result, features, labels, context.samples.features.decay)
        context.advance("local", step + 1, steps)
    with torch.no_grad():
        tail.weight.copy_(result[0])
        tail.bias.copy_(result[1])
    return loss


def step_classifier(
    weight: Tensor, bias: Tensor, features: Features, labels: Tensor, decay: float
) -> tuple[tuple[Tensor, Tensor], float]:
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
    if not 0 <= loss <= MAX_LOSS:
        raise Diverged(f"the local update has diverged: its loss is {loss:g}")
    errors = scores.softmax(dim=1) - F.one_hot(labels, len(bias)).double()  # (n, C)
    slope = errors.T @ (values - mean) / len(labels)
    change = (slope + penalty * weight) * step  # (C, r)
    return (weight - change, bias - _CURVATURE * errors.mean(dim=0) + change @ mean), loss


def classifier_loss(context: RoundContext, plane: SplitPlane) -> float:
    """Return the loss that `tune_classifier` lowers: mean cross-entropy, and the penalty.

    A device that has no features, because it has restarted, requests them.

    Raises:
        StaleRound: the round's evaluation is over.
    """
    features, cache = _known_features(context, plane), context.samples.features
    tail, variances = context.model.tail.trunk.head, features.variances.double()
    labels = context.samples.images.image_set.labels[: len(features.values)]
    weight = tail.weight.detach().double()  # (C, r)
    scores = features.values.double() @ weight.T + tail.bias.detach().double()  # (n, C)
    used = variances > 0
    penalty = float((cache.decay * weight.square()[:, used] / variances[used]).sum() / 2)
    return float(F.cross_entropy(scores, labels)) + penalty


def _known_features(context: RoundContext, plane: SplitPlane) -> Features:
    """Return the features of round 0; request them if this device has none of that attempt."""
    cache = context.samples.features
    if cache.features is None or cache.attempt != context.start_attempt:
        features = _request_features(context, plane, context.start_attempt)
        # The server checks each update against the device's sums; it has lost them or has none.
        labels = context.samples.images.image_set.labels[: len(features.values)]
        one_hot = F.one_hot(labels, context.run.model.num_classes).double()
        _send_sums(context, plane, features.values, one_hot)
        return features
    return cache.features


def _send_sums(context: RoundContext, plane: SplitPlane, features: Tensor, one_hot: Tensor) -> Fit:
    """Send the sums of the features [n, r] in each class, and their number."""
    sums, counts = one_hot.T @ features.double(), one_hot.sum(dim=0)
    return plane.solve(sums.float(), counts.float(), context.attempt, len(features), context.round)


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
    positions = torch.arange(len(samples))
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
