"""A bound on the L2 norm of each update, relative to the norms of the round's other updates.

A few numbers of 1e30 in one update, or an update multiplied by -20, would dominate the mean. An
update whose norm is far above most others is therefore refused. The bound depends only on the
updates and the state of the round, so that a restarted server refuses the same updates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_NEGLIGIBLE = 0.01  # times the state's norm: a change below this is never refused

_MIN_UPDATES = 3  # from here on the median is the norm of a majority

_ABSOLUTE = 100.0  # with fewer updates: times the norm of the state, or of as many ones


@dataclass(frozen=True)
class Norms:
    """The L2 norms of an update.

    Attributes:
        change: norm of the change of the state.
        extras: norm of the further tensors of the tuning method.
    """

    change: float
    extras: float


@dataclass(frozen=True)
class Excess:
    """The norm of an update that is refused.

    Attributes:
        norm: of the update.
        limit: largest norm that is accepted.
    """

    norm: float
    limit: float


def measure(update: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Norms:
    """Compute the norms of an update in float64, with its tensors in the order of their names."""
    change = sum(
        float((update[name].double() - state[name].double()).square().sum())
        for name in sorted(state)
    )
    extras = sum(
        float(update[name].double().square().sum()) for name in sorted(update) if name not in state
    )
    return Norms(math.sqrt(change), math.sqrt(extras))


def norm_of(state: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of a state."""
    return math.sqrt(sum(float(state[name].double().square().sum()) for name in sorted(state)))


def find_excess(
    norms: Sequence[Norms], state: float, factor: float, numbers: int
) -> dict[int, Excess]:
    """Find the updates whose norm is too large.

    With three or more updates, the limit is ``factor`` times the (lower) median of their norms.
    With fewer updates there is no majority, and a wide limit relative to the state applies.

    Args:
        norms: norms of all updates of the round.
        state: norm of the state before the round.
        factor: largest accepted ratio of a norm to the median.
        numbers: number of elements of the state.

    Returns:
        The excess of each refused update, by its position.
    """
    found: dict[int, Excess] = {}
    changes = [each.change for each in norms]
    absolute = _ABSOLUTE * max(state, math.sqrt(numbers))
    limit = _limit(changes, factor, floor=_NEGLIGIBLE * state, absolute=absolute)
    found |= {at: Excess(each, limit) for at, each in enumerate(changes) if not each <= limit}
    extras = [each.extras for each in norms]
    limit = _limit(extras, factor, floor=0.0, absolute=math.inf)
    found |= {at: Excess(each, limit) for at, each in enumerate(extras) if not each <= limit}
    return found


def _limit(norms: Sequence[float], factor: float, *, floor: float, absolute: float) -> float:
    if len(norms) < _MIN_UPDATES:
        return absolute
    return max(factor * statistics.median_low(norms), floor)
