"""The aggregation of a round: refuse updates that are too long, then apply the run's rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from protocol.federation import FederationSettings
from split_server.aggregation import robust
from split_server.aggregation.fedavg import WeightedState, federated_average
from split_server.aggregation.norm_bound import Excess, find_excess, measure, norm_of


@dataclass(frozen=True)
class Aggregated:
    """The result of an aggregation rule.

    Attributes:
        tensors: the new state, and the aggregated further tensors.
        left_out: positions of valid updates that the rule does not use.
    """

    tensors: dict[str, Tensor]
    left_out: tuple[int, ...] = ()


def find_refused(
    federation: FederationSettings,
    loads: Sequence[Callable[[], Mapping[str, Tensor]]],
    state: Mapping[str, Tensor],
) -> dict[int, Excess]:
    """Find the updates whose norm is too large to count, by position.

    With differential privacy there are none: large updates are clipped instead.

    Args:
        federation: federation settings of the run.
        loads: functions that read an update; one update is in memory at a time.
        state: the global state before the round.
    """
    if federation.update_norm_bound is None or federation.dp_clip is not None:
        return {}
    norms = [measure(load(), state) for load in loads]
    numbers = sum(tensor.numel() for tensor in state.values())
    return find_excess(norms, norm_of(state), federation.update_norm_bound, numbers)


def aggregate(federation: FederationSettings, updates: Sequence[WeightedState]) -> Aggregated:
    """Aggregate updates with the run's rule.

    `fedavg` and `multi-krum` weight updates by their samples; the other rules do not.

    Raises:
        EmptyUpdate: there is no update.
        WrongShape: the updates have different tensors.
        NonFinite: the result is not finite.
    """
    rule = federation.aggregation
    if rule == "fedavg" or len(updates) < 2:
        return Aggregated(federated_average(updates))
    hostile = robust.count_hostile(federation.hostile_share, len(updates))
    if rule == "median":
        return Aggregated(robust.median([update.load() for update in updates]))
    if rule == "trimmed-mean":
        return Aggregated(robust.trimmed_mean([update.load() for update in updates], hostile))
    nearest = robust.krum([update.load() for update in updates], hostile)
    count = 1 if rule == "krum" else max(1, len(updates) - hostile)
    chosen, left_out = sorted(nearest[:count]), tuple(sorted(nearest[count:]))
    return Aggregated(federated_average(updates[at] for at in chosen), left_out)
