"""Round 0 of the default form, with all that the server sees of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.torch_model import read
from protocol.codecs.registry import as_decoded
from protocol.plan import RunPlan
from sfprompt_bench.methods.pooled import PooledModel
from split_model.linear_fit import calibrate, leave_one_out
from split_model.parts.depths import feature_shape, read_blocks
from split_server.closed_form.basis import Basis, Moments, fit_basis
from split_server.closed_form.classifier import FeatureSums, fit_classifier

_BATCH = 100


@dataclass(frozen=True)
class ObservedStart:
    """One participant's round 0 as the server sees it, and the labels that it does not see.

    Attributes:
        features: that the server sent, [N, r], as the device decoded them.
        sums: of the features in each class, which it received, [C, r].
        counts: of the samples in each class, which it received, [C].
        labels: of the samples, [N].
    """

    features: Tensor
    sums: Tensor
    counts: Tensor
    labels: Tensor


@torch.no_grad()
def observe_start(model: PooledModel, plan: RunPlan) -> tuple[Basis, ObservedStart]:
    """Fit the tail of a model with one participant in closed form; it stays in the model.

    Returns:
        The basis of the features, and what the server sees.
    """
    tokens, labels = [], []
    for positions in torch.arange(len(model.train)).split(_BATCH):
        images, classes = read(model.train, positions.numpy())
        smashed = as_decoded(model.head(images), plan.wire.smashed)
        tokens.append(model.body(smashed, model.prompts).flatten(1))
        labels.append(classes)
    flat, label = torch.cat(tokens), torch.cat(labels)  # [N, q], [N]
    moments = Moments(flat.shape[1])
    moments.add(flat)
    _, rank = feature_shape(plan.model)
    basis = fit_basis(moments, rank, len(read_blocks(plan.model)))
    features = as_decoded(basis.project(flat.unsqueeze(1)), plan.wire.start).flatten(1)
    one_hot = F.one_hot(label, plan.model.num_classes).double()
    sums, counts = (one_hot.T @ features.double()).float(), one_hot.sum(dim=0)
    _fit_tail(model, basis, ObservedStart(features, sums, counts, label), one_hot)
    return basis, ObservedStart(features, sums, counts, label)


def _fit_tail(model: PooledModel, basis: Basis, seen: ObservedStart, one_hot: Tensor) -> None:
    features = seen.features.double()
    mean = features.mean(dim=0)
    products = (features - mean).T @ (features - mean)
    fit = fit_classifier(
        FeatureSums(len(features), mean, products), seen.sums.double(), seen.counts, basis.scale
    )
    scores = seen.features @ fit.weight.T + fit.bias
    leverage = fit.leverage(seen.features).float()
    left_out = leave_one_out(scores.numpy(), one_hot.numpy(), leverage.numpy())
    factor, _ = calibrate(left_out, seen.labels.numpy())
    classifier = dict(model.tail.named_parameters())
    classifier["trunk.head.weight"].copy_(factor * fit.weight)
    classifier["trunk.head.bias"].copy_(factor * fit.bias)
