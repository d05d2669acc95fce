"""Aggregation rules that tolerate a share of hostile participants.

Each rule returns a state of float32 tensors, and does not depend on the order in which updates
arrived: the caller fixes their order. With equal updates every rule returns that update.

Sources: median and trimmed mean (Yin et al., arXiv 1803.01498); Krum and Multi-Krum (Blanchard et
al., NeurIPS 2017, arXiv 1703.02757).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from protocol.errors import EmptyUpdate

_CHUNK_NUMBERS = 1 << 20  # of each update in memory at a time

Update = Mapping[str, Tensor]


def tolerated(share: float, updates: int) -> int:
    """Return the number of hostile ones among ``updates`` for a share, rounded up."""
    return math.ceil(share * updates - 1e-9)


def median(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Return the median of each number; the mean of the middle two of an even number."""
    return _combine(updates, lambda ranked: _middle(ranked, (len(ranked) - 1) // 2))


def trimmed_mean(updates: Sequence[Update], hostile: int) -> dict[str, Tensor]:
    """Return the mean of each number without its ``hostile`` least and greatest values.

    At most as many are left out as leave one or two values.
    """
    cut = min(hostile, (len(updates) - 1) // 2)
    return _combine(updates, lambda ranked: _middle(ranked, cut))


def krum(updates: Sequence[Update], hostile: int) -> list[int]:
    """Return the positions of the updates, those nearest to their neighbours first.

    An update's score is the sum of its squared distances to the nearest n - ``hostile`` - 2 others,
    at least one; of equal scores the first.
    """
    distances = _squared_distances(updates)
    near = max(1, len(updates) - hostile - 2)
    scores = [sum(sorted(row[:at] + row[at + 1 :])[:near]) for at, row in enumerate(distances)]
    return sorted(range(len(updates)), key=lambda at: (scores[at], at))


def _middle(ranked: Tensor, cut: int) -> Tensor:
    """Return the mean of sorted values [n, numbers], without ``cut`` at either end."""
    return ranked[cut : len(ranked) - cut].double().mean(dim=0)


def _combine(updates: Sequence[Update], reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    if not updates:
        raise EmptyUpdate("there is no update to average", field="updates", limit=1, value=0)
    combined: dict[str, Tensor] = {}
    for name in sorted(updates[0]):
        flat = [update[name].flatten() for update in updates]
        result = torch.empty(flat[0].numel(), dtype=torch.float32)
        for start in range(0, len(result), _CHUNK_NUMBERS):
            part = torch.stack([each[start : start + _CHUNK_NUMBERS] for each in flat])
            ranked = part.sort(dim=0).values
            result[start : start + _CHUNK_NUMBERS] = reduce(ranked).float()
        combined[name] = result.reshape(updates[0][name].shape)
    return combined


def _squared_distances(updates: Sequence[Update]) -> list[list[float]]:
    distances = [[0.0] * len(updates) for _ in updates]
    for name in sorted(updates[0]):
        tensors = [update[name].double() for update in updates]
        for at, one in enumerate(tensors):
            for other in range(at):
                distance = float((one - tensors[other]).square().sum())
                distances[at][other] += distance
                distances[other][at] += distance
    return distances
