"""A closed-form start on pooled samples: what tuned bodies are trained towards and compared by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.codecs.registry import as_decoded
from protocol.plan import RunPlan
from split_model.linear_fit import Fit, scale_fit
from split_model.parts.depths import feature_shape, read_blocks
from split_server.closed_form.basis import Basis, Moments, fit_basis
from split_server.closed_form.classifier import FeatureSums, fit_classifier
from split_server.closed_form.sample_features import CHUNK, SampleFeatures


@dataclass(frozen=True)
class PooledStart:
    """A start on some samples, and how well it classifies the others.

    Attributes:
        basis: of the features.
        weight, bias: of the scaled classifier, [C, r] and [C].
        loss: mean cross-entropy of the other samples, in nats.
        correct: number of the others that are classified rightly.
        samples: number of the others.
    """

    basis: Basis
    weight: Tensor
    bias: Tensor
    loss: float
    correct: int
    samples: int

    def to(self, device: torch.device) -> PooledStart:
        """Return the start on a device."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        return replace(self, basis=self.basis.to(device), weight=weight, bias=bias)

    def is_better_than(self, other: PooledStart) -> bool:
        """Whether the other samples have a smaller loss, and no fewer are right."""
        return self.loss < other.loss and self.correct >= other.correct


def fit_pooled(
    features: SampleFeatures, labels: Tensor, is_train: Tensor, plan: RunPlan
) -> PooledStart:
    """Fit a start as round 0 does, on a part of the samples.

    Args:
        features: what the tail reads of all samples.
        labels: int64 [N].
        is_train: bool [N], the part; the others measure the start.
        plan: of the run.
    """
    classes, (_, rank) = plan.model.num_classes, feature_shape(plan.model)
    moments = Moments(features.numbers)
    for chunk, used in zip(features.chunks(), is_train.split(CHUNK), strict=True):
        if bool(used.any()):
            moments.add(chunk[used])
    basis = fit_basis(moments, rank, len(read_blocks(plan.model)))
    codec = plan.wire.start
    values = torch.cat(
        [as_decoded(basis.project(chunk[:, None]), codec).flatten(1) for chunk in features.chunks()]
    )
    train, train_labels = values[is_train], labels[is_train]
    weight, bias = _fit(train, train_labels, basis, classes)
    scores, others = values[~is_train] @ weight.T + bias, labels[~is_train]
    loss = F.cross_entropy(scores, others).item() if len(others) else 0.0
    correct = int((scores.argmax(dim=1) == others).sum())
    return PooledStart(basis, weight, bias, loss, correct, len(others))


def _fit(values: Tensor, labels: Tensor, basis: Basis, classes: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the ridge regression, scaled to its leave-one-out scores."""
    exact = values.double()
    mean = exact.mean(dim=0)
    centred = exact - mean
    one_hot = F.one_hot(labels, classes).double()
    sums = FeatureSums(len(exact), mean, centred.T @ centred)
    solved = fit_classifier(sums, one_hot.T @ exact, one_hot.sum(dim=0), basis.scale)
    strength = solved.strength / max(1, solved.count)
    leverage = solved.leverage(values).float()
    fit = Fit(solved.weight.numpy(), solved.bias.numpy(), leverage.numpy(), strength)
    factor, _, _ = scale_fit(fit, values.numpy(), labels.numpy())
    return factor * solved.weight, factor * solved.bias
