"""FedAvg: the mean of the participants' states, weighted by their numbers of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import EmptyUpdate, NonFinite, WrongShape


@dataclass(frozen=True)
class WeightedState:
    """One update.

    Attributes:
        samples: number of samples, the weight of the update.
        load: reads the tensors of the update.
    """

    samples: int
    load: Callable[[], Mapping[str, Tensor]]


def federated_average(updates: Iterable[WeightedState]) -> dict[str, Tensor]:
    """Compute the weighted mean in float64, and cast it to float32.

    The last digits depend on the order of the updates, which the caller must fix. One update is in
    memory at a time.

    Raises:
        EmptyUpdate: there is no update, or an update has no samples.
        WrongShape: the updates have different tensors.
        NonFinite: the mean is not finite in float32.
    """
    sums: dict[str, Tensor] = {}
    total = 0
    for update in updates:
        if update.samples < 1:
            raise EmptyUpdate(
                "an update needs at least one sample",
                field="samples",
                limit=1,
                value=update.samples,
            )
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
            "the updates have different tensors",
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
    """Compute the weighted mean of the values that are not None; None if there are none."""
    present = [(value, weight) for value, weight in values if value is not None and weight > 0]
    total = sum(weight for _, weight in present)
    return sum(value * (weight / total) for value, weight in present) if total else None
