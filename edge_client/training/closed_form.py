"""The linear tail: fitted in closed form in round 0, then tuned by steps of logistic regression.

In round 0 the server computes the features of all participants' samples, and their second moments.
The device sends the sum of its features in each class. It receives the classifier that the sums of
all devices give, and calibrates its scores on its own samples. It never sends the label of a
sample.

Source: Fed3R (arXiv 2406.01116).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_client.data.image_set import Labels
from edge_client.model import Floats
from edge_client.training.context import Diverged, RoundContext
from edge_client.transport.split_client import SamplesMissing, SplitPlane
from protocol.messages import MAX_LOSS
from split_model.linear_fit import (
    USUAL_FACTOR,
    Features,
    Fit,
    one_hot_sums,
    penalised_loss,
    scale_fit,
    step_classifier,
)

_MAX_UPLOADS = 3  # uploads of samples that the server has lost


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
    weight, bias = (each.astype(np.float64) for each in context.model.classifier)
    loss = 0.0
    for step in range(steps):
        decay = context.samples.features.decay
        (weight, bias), loss = step_classifier(weight, bias, features, labels, decay)
        if not 0 <= loss <= MAX_LOSS:
            raise Diverged(f"the local update has diverged: its loss is {loss:g}")
        context.advance("local", step + 1, steps)
    context.model.set_classifier(weight, bias)
    return loss


def classifier_loss(context: RoundContext, plane: SplitPlane) -> float:
    """Return the loss that `tune_classifier` lowers.

    A device that has no features, because it has restarted, requests them.

    Raises:
        StaleRound: the round's evaluation is over.
    """
    features, cache = _known_features(context, plane), context.samples.features
    labels = context.samples.images.image_set.labels[: len(features.values)]
    weight, bias = context.model.classifier
    return penalised_loss(weight, bias, features, labels, cache.decay)


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
    sums, counts = one_hot_sums(features, labels, context.run.model.num_classes)
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
    cache.decay = decay if fitted_in == basis else features.strength / USUAL_FACTOR
    return features
