"""FedAvg: the mean of the participants' states, weighted by their kept samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import EmptyUpdate, NonFinite, WrongShape


@dataclass(frozen=True)
class WeightedState:
    """One update: where its tensors come from, and its weight."""

    samples: int
    load: Callable[[], Mapping[str, Tensor]]


def federated_average(updates: Iterable[WeightedState]) -> dict[str, Tensor]:
    """The weighted mean in float64, cast back to float32.

    The caller fixes the order of the updates, so that the order in which they arrived cannot
    show in the result. One update is in memory at a time.

    Raises:
        EmptyUpdate: no update, or an update of no sample.
        WrongShape: the updates do not hold the same tensors.
        NonFinite: the mean is not finite in float32.
    """
    sums: dict[str, Tensor] = {}
    total = 0
    for update in updates:
        if update.samples < 1:
            raise EmptyUpdate("an update of no sample has no weight", field="samples", limit=1)
        _add(sums, update.load(), update.samples, first=total == 0)
        total += update.samples
    if total == 0:
        raise EmptyUpdate("there is no update to average", field="updates", limit=1, value=0)
    mean = {name: (tensor / total).to(torch.float32) for name, tensor in sums.items()}
    for name, tensor in mean.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFinite("the average is not finite", field=name)
    return mean


def _add(
    sums: dict[str, Tensor], state: Mapping[str, Tensor], samples: int, *, first: bool
) -> None:
    if not first and sums.keys() != state.keys():
        raise WrongShape(
            "the updates hold different tensors",
            field="tensors",
            limit=sorted(sums),
            value=sorted(state),
        )
    for name in sorted(state):
        weighted = state[name].to(torch.float64) * samples
        if first:
            sums[name] = weighted
        elif sums[name].shape != weighted.shape:
            raise WrongShape(
                "the updates differ in shape",
                field=name,
                limit=list(sums[name].shape),
                value=list(weighted.shape),
            )
        else:
            sums[name] += weighted


def weighted_mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of those values that are there, weighted; None if none is."""
    present = [(value, weight) for value, weight in values if value is not None and weight > 0]
    total = sum(weight for _, weight in present)
    return sum(value * (weight / total) for value, weight in present) if total else None
