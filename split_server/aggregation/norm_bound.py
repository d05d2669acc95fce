"""A bound on the length of each update, relative to the lengths of the round's other updates.

A few numbers of 1e30 in one update, or the negative of an update times twenty, would decide the
mean of all. An update that is much longer than most is therefore refused before it is averaged.
The bound depends on the round's updates and its state alone, so that a restarted server refuses
the same ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_NEGLIGIBLE = 0.01  # of the state's length: a change below it is never refused

_FEWEST = 3  # updates of which a majority can be told

_ABSOLUTE = 100.0  # times the state's length, with fewer; its numbers count as at least 1 each


@dataclass(frozen=True)
class Lengths:
    """L2 norms of one update: of its change of the state, and of its further tensors."""

    change: float
    extras: float


@dataclass(frozen=True)
class Excess:
    """An update that is too long.

    Attributes:
        length: its length.
        limit: the longest that would have counted.
    """

    length: float
    limit: float


def measure(update: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Lengths:
    """Measure an update, in float64, tensor by tensor in the order of their names."""
    change = sum(
        float((update[name].double() - state[name].double()).square().sum())
        for name in sorted(state)
    )
    extras = sum(
        float(update[name].double().square().sum()) for name in sorted(update) if name not in state
    )
    return Lengths(math.sqrt(change), math.sqrt(extras))


def length_of(state: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of a state."""
    return math.sqrt(sum(float(state[name].double().square().sum()) for name in sorted(state)))


def find_excess(
    lengths: Sequence[Lengths], state: float, factor: float, numbers: int
) -> dict[int, Excess]:
    """Find the updates that are too long.

    With three updates or more, the limit is ``factor`` times the median of their lengths, the lower
    one of two. With fewer, no majority can be told, and only a wide limit relative to the state
    holds.

    Args:
        lengths: of all updates of the round.
        state: length of the state that they change.
        factor: above it an update is refused.
        numbers: of the state.

    Returns:
        The excess by position.
    """
    found: dict[int, Excess] = {}
    changes = [each.change for each in lengths]
    absolute = _ABSOLUTE * max(state, math.sqrt(numbers))
    limit = _limit(changes, factor, floor=_NEGLIGIBLE * state, absolute=absolute)
    found |= {at: Excess(each, limit) for at, each in enumerate(changes) if not each <= limit}
    extras = [each.extras for each in lengths]
    limit = _limit(extras, factor, floor=0.0, absolute=math.inf)
    found |= {at: Excess(each, limit) for at, each in enumerate(extras) if not each <= limit}
    return found


def _limit(lengths: Sequence[float], factor: float, *, floor: float, absolute: float) -> float:
    if len(lengths) < _FEWEST:
        return absolute
    return max(factor * statistics.median_low(lengths), floor)
