"""Decide whether a round's state replaces the best one, from the losses that devices report.

A device compares each state with the best one on the same samples of its own, so that differences
between devices cancel out. Each device's difference is clipped at the median size, so that one
dishonest device cannot decide alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

_LEAST_GAIN = 1e-3  # relative decrease of the loss that counts as progress


@dataclass(frozen=True)
class Report:
    """One device's loss of one state.

    Attributes:
        loss: mean over ``samples``, in nats.
        samples: behind this mean.
    """

    loss: float
    samples: int


@dataclass(frozen=True)
class Verdict:
    """How a state compares with the best one before it.

    Attributes:
        change: of the loss, clipped for each device and weighted by samples, in nats.
        loss: of the best state, weighted by samples.
    """

    change: float
    loss: float

    @property
    def is_kept(self) -> bool:
        """Whether the state is not worse, and becomes the best one."""
        return self.change <= 0

    @property
    def is_progress(self) -> bool:
        """Whether the loss has become lower by enough to go on."""
        return self.change < -_LEAST_GAIN * self.loss


def compare(new: Mapping[str, Report], best: Mapping[str, Report]) -> Verdict | None:
    """Compare two states by the devices that reported both; None: there is no such device.

    Args:
        new, best: each device's report of the new and of the best state, by participant.
    """
    both = sorted(new.keys() & best.keys())
    samples = [min(new[id_].samples, best[id_].samples) for id_ in both]
    total = sum(samples)
    if not total:
        return None
    changes = [new[id_].loss - best[id_].loss for id_ in both]
    limit = statistics.median(abs(change) for change in changes)
    # A device counts for at most twice the median number of samples.
    heaviest = 2 * statistics.median(samples)
    weights = [min(count, heaviest) for count in samples]
    clipped = [max(-limit, min(limit, change)) for change in changes]
    change = sum(w * c for w, c in zip(weights, clipped, strict=True)) / sum(weights)
    loss = sum(w * best[id_].loss for w, id_ in zip(weights, both, strict=True)) / sum(weights)
    return Verdict(change, loss)
