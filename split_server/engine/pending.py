"""A graph whose gradients are coming in."""

from __future__ import annotations

from collections.abc import Callable

from split_server.engine.steps import Graph, StepKey
from split_server.engine.tasks import BackwardTask

_LONGEST_S = 3.0  # a first forward takes long for reasons of its own


class PendingGraph:
    """The gradients of one graph that have come, and how long the others are waited for.

    Waiting leaves the device idle; not waiting costs the latecomers' forward once more. So they
    are waited for about as long as that forward takes: never more than twice the better choice,
    whenever they come (the ski rental rule).
    """

    Wanted = Callable[[Graph], set[StepKey]]

    def __init__(self, graph: Graph, least_s: float) -> None:
        self.graph = graph
        self.patience_s = max(least_s, min(graph.seconds, _LONGEST_S))
        self.tasks: dict[StepKey, BackwardTask] = {}
        self.first_at = 0.0  # on the monotonic clock

    @property
    def samples(self) -> int:
        return sum(task.samples for task in self.tasks.values())

    def add(self, task: BackwardTask) -> None:
        if not self.tasks:
            self.first_at = task.arrived
        self.tasks[task.key] = task

    def is_complete(self, wanted: Wanted) -> bool:
        """Whether nobody is left to wait for."""
        return wanted(self.graph) <= self.tasks.keys()
