"""Train one device, and infer the labels of each round from what the server receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.data.dataset import Dataset
from protocol.settings import RunSettings
from sfprompt_bench.leak.attacks import (
    cluster_directions,
    infer_from_sums,
    infer_labels,
    purity,
)
from sfprompt_bench.leak.rounds import ObservedRound, observe_rounds
from sfprompt_bench.leak.start import ObservedStart, observe_start
from sfprompt_bench.methods.pooled import PooledModel


@dataclass(frozen=True)
class LeakResult:
    """Shares of one round's labels that the server infers, and of random labels for comparison.

    Attributes:
        gradients: their codec; None: round 0, from the sums in each class.
        round: its number.
        samples: number of labels.
        by_least_squares: from gradients with the tail of the round's global state, or from sums.
        by_least_squares_random: of random labels.
        by_clusters: purity of clusters of the gradients' directions, without the tail.
        by_clusters_random: of random labels.
    """

    gradients: str | None
    round: int
    samples: int
    by_least_squares: float
    by_least_squares_random: float
    by_clusters: float | None = None
    by_clusters_random: float | None = None


def measure_leak(settings: RunSettings, data: Dataset, rounds: int) -> Iterator[LeakResult]:
    """Train ``rounds`` rounds of one device with all training images, and attack each.

    A run that starts in closed form has a round 0 before them.

    Raises:
        InvalidField: the server does not tune the prompts, or the model cannot be obtained.
    """
    plan = settings.plan
    model, basis = PooledModel(plan, data), None
    if plan.model.depths:
        basis, start = observe_start(model, plan)
        yield attack_start(start, plan.seed)
    for observed in observe_rounds(model, plan, rounds, basis):
        yield attack_round(observed, plan.wire.gradients, plan.model.num_classes, plan.seed)


def attack_start(observed: ObservedStart, seed: int) -> LeakResult:
    """Infer the labels of round 0; ``seed`` is that of the random labels."""
    inferred = infer_from_sums(observed.features, observed.sums, observed.counts)
    random = _shuffled(observed.labels, seed)
    return LeakResult(
        gradients=None,
        round=0,
        samples=len(inferred),
        by_least_squares=_share(inferred == observed.labels),
        by_least_squares_random=_share(inferred == random),
    )


def attack_round(observed: ObservedRound, codec: str, classes: int, seed: int) -> LeakResult:
    """Infer the labels of a round, with its tail and without.

    Args:
        observed: the round.
        codec: of the gradients, for the result.
        classes: their number.
        seed: of the clusters and of the random labels.
    """
    labels = observed.labels
    random = _shuffled(labels, seed)
    inferred = infer_labels(observed.tail, observed.features, observed.gradients)
    clusters = cluster_directions(observed.gradients, classes, seed)
    return LeakResult(
        gradients=codec,
        round=observed.number,
        samples=len(labels),
        by_least_squares=_share(inferred == labels),
        by_least_squares_random=_share(inferred == random),
        by_clusters=purity(clusters, labels),
        by_clusters_random=purity(clusters, random),
    )


def _shuffled(labels: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return labels[torch.randperm(len(labels), generator=generator)]


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
