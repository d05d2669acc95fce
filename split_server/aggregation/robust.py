"""Aggregation rules that tolerate a share of hostile participants.

The caller fixes the order of the updates, so that results do not depend on the order of arrival. If
all updates are equal, the result is that update.

Sources: median and trimmed mean (Yin et al., arXiv 1803.01498); Krum and Multi-Krum (Blanchard et
al., NeurIPS 2017, arXiv 1703.02757).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from protocol.errors import EmptyUpdate

_CHUNK_NUMBERS = 1 << 20  # elements of each update in memory at a time

Update = Mapping[str, Tensor]


def count_hostile(share: float, updates: int) -> int:
    """Return the number of hostile participants for a share, rounded up."""
    return math.ceil(share * updates - 1e-9)


def median(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Return the median of each element, in float32; for an even number, the middle two's mean."""
    return _combine(updates, lambda ranked: _middle(ranked, (len(ranked) - 1) // 2))


def trimmed_mean(updates: Sequence[Update], hostile: int) -> dict[str, Tensor]:
    """Return the mean of each element without its smallest and largest values, in float32.

    Args:
        updates: states with the same tensors.
        hostile: number of values dropped at either end; fewer if none would remain.
    """
    cut = min(hostile, (len(updates) - 1) // 2)
    return _combine(updates, lambda ranked: _middle(ranked, cut))


def krum(updates: Sequence[Update], hostile: int) -> list[int]:
    """Return the positions of the updates, sorted by their Krum score.

    The score of an update is the sum of its squared distances to the n - ``hostile`` - 2 nearest
    other updates, or to the nearest one. Updates with equal scores keep their order.

    Args:
        updates: n states with the same tensors.
        hostile: number of hostile participants to tolerate.
    """
    distances = _squared_distances(updates)
    near = max(1, len(updates) - hostile - 2)
    scores = [sum(sorted(row[:at] + row[at + 1 :])[:near]) for at, row in enumerate(distances)]
    return sorted(range(len(updates)), key=lambda at: (scores[at], at))


def _middle(ranked: Tensor, cut: int) -> Tensor:
    """Return the mean [k] of sorted values [n, k], without ``cut`` values at either end."""
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
