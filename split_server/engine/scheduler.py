"""Which tasks are next: backward before forward, older first, and every sender in its turn."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from split_server.engine.api import StepKey
from split_server.engine.steps import Graph
from split_server.engine.tasks import BackwardTask, ForwardTask, Kind, OwnTask, Sender, Task

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


_PEERS_S = 1.0  # whoever was here within this time is expected back

_MOST_SEEN = 1000

_HOLD_FACTOR = 20  # times its first patience a graph waits at most while there is other work

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Batch:
    """Tasks that are computed together; of a graph, where the backward runs through one."""

    tasks: Sequence[Task]
    graph: Graph | None = None


@dataclass
class _Lane(Generic[T]):
    """Waiting tasks of one kind, the next one first."""

    heap: list[tuple[float, int, T]] = field(default_factory=list)
    seen: dict[Sender, float] = field(default_factory=dict)  # when each sender came last
    samples: int = 0

    def add(self, turn: float, number: int, task: T) -> None:
        heapq.heappush(self.heap, (turn, number, task))
        self.seen[task.sender] = task.arrived
        self.samples += task.samples

    def take(self, most: int) -> list[T]:
        """The next tasks, of at most so many samples together; one at least."""
        taken: list[T] = []
        samples = 0
        while self.heap and (not taken or samples + self.heap[0][2].samples <= most):
            task = heapq.heappop(self.heap)[2]
            samples += task.samples
            taken.append(task)
        self.samples -= samples
        return taken

    def held_until(self, most: int, max_wait_s: float, now: float) -> float:
        """Until when others, who were here a moment ago, are worth waiting for."""
        if len(self.seen) > _MOST_SEEN:
            self._forget_old(now)
        oldest = min(task.arrived for _, _, task in self.heap)
        if self.samples >= most or oldest + max_wait_s <= now:
            return now
        waiting = {task.sender for _, _, task in self.heap}
        self._forget_old(now)
        return oldest + max_wait_s if self.seen.keys() - waiting else now

    def _forget_old(self, now: float) -> None:
        self.seen = {who: at for who, at in self.seen.items() if at + _PEERS_S > now}


class Schedule:
    """The waiting tasks. Not thread-safe: the engine holds its lock.

    Senders take turns by the samples that they have had (start-time fair queuing, Goyal et al.
    1996): whoever sends much waits behind whoever sends little, and nobody waits for ever.

    Args:
        max_tokens: tokens of a batch beyond which it gains nothing more on this device.
        max_samples: samples of a batch; None: as many as ``max_tokens`` allow.
        max_wait_s: the longest that a task waits for others while the device is idle.
    """

    def __init__(self, max_tokens: int, max_samples: int | None, max_wait_s: float) -> None:
        self._max_tokens = max_tokens
        self._max_samples = max_samples
        self._max_wait_s = max_wait_s
        self._forward: dict[Kind, _Lane[ForwardTask | OwnTask]] = {}
        self._again: dict[Kind, _Lane[BackwardTask]] = {}  # backwards that need their forward first
        self._graphs: dict[Graph, PendingGraph] = {}
        self._numbers = itertools.count()
        self._turn = 0.0  # of the task that was taken last
        self._next_turn: dict[Sender, float] = {}

    def __len__(self) -> int:
        waiting = sum(len(lane.heap) for lane in self._lanes())
        return waiting + sum(len(pending.tasks) for pending in self._graphs.values())

    @property
    def samples(self) -> int:
        """How many samples wait."""
        waiting = sum(lane.samples for lane in self._lanes())
        return waiting + sum(pending.samples for pending in self._graphs.values())

    def add_forward(self, task: ForwardTask | OwnTask, now: float) -> None:
        """A forward, or either way through weights of one's own: memory is no reason to hurry."""
        task.arrived = now
        lane = self._forward.setdefault(task.kind, _Lane())
        lane.add(self._turn_of(task), next(self._numbers), task)

    def add_backward(self, task: BackwardTask, now: float) -> None:
        """A backward joins the others of its graph; without one, others that lack theirs."""
        task.arrived = now
        if (graph := task.step.graph) is None:
            self._add_again(task)
            return
        pending = self._graphs.setdefault(graph, PendingGraph(graph, self._max_wait_s))
        pending.add(task)

    def next(self, now: float, wanted: PendingGraph.Wanted) -> Batch | float:
        """The next batch; or how many seconds there is nothing to do, unless a task comes.

        Args:
            now: on the monotonic clock.
            wanted: which steps of a graph may still send their gradients.
        """
        for pending in self._graphs.values():  # the oldest first
            patience = pending.first_at + _HOLD_FACTOR * pending.patience_s
            if pending.is_complete(wanted) or patience <= now:
                return self._through(pending, wanted)
        if self._again:
            return self._next_again()
        free, until = self._free_lanes(now)
        if free:
            kind = self._first(free)
            forwards: list[ForwardTask | OwnTask] = self._take(free[kind], kind)
            return Batch(forwards)
        for pending in self._graphs.values():
            if pending.first_at + pending.patience_s <= now:
                return self._through(pending, wanted)
            until = min(until, pending.first_at + pending.patience_s)
        return until - now

    def drain(self) -> list[Task]:
        """Everything that waits; nothing does after."""
        left: list[Task] = [task for lane in self._lanes() for _, _, task in lane.heap]
        left += [task for pending in self._graphs.values() for task in pending.tasks.values()]
        self._forward.clear()
        self._again.clear()
        self._graphs.clear()
        return left

    def _through(self, pending: PendingGraph, wanted: PendingGraph.Wanted) -> Batch:
        """Backward through a graph; where most of its gradients lack, rather without it."""
        del self._graphs[pending.graph]
        tasks = list(pending.tasks.values())
        lacking = wanted(pending.graph) - pending.tasks.keys()
        rows = pending.graph.rows
        missing = sum(rows[key].stop - rows[key].start for key in lacking)
        if pending.samples >= missing:  # a forward costs what a backward costs: no dearer than anew
            return Batch(tasks, pending.graph)
        for task in tasks:
            self._add_again(task)
        return self._next_again()

    def _next_again(self) -> Batch:
        kind = self._first(self._again)
        tasks: list[BackwardTask] = self._take(self._again[kind], kind)
        if not self._again[kind].heap:
            del self._again[kind]
        return Batch(tasks)

    def _add_again(self, task: BackwardTask) -> None:
        lane = self._again.setdefault(task.kind, _Lane())
        lane.add(self._turn_of(task), next(self._numbers), task)

    def _turn_of(self, task: Task) -> float:
        turn = max(self._turn, self._next_turn.get(task.sender, 0.0))
        self._next_turn[task.sender] = turn + task.samples
        return turn

    def _free_lanes(self, now: float) -> tuple[dict[Kind, _Lane[ForwardTask | OwnTask]], float]:
        """The lanes that wait for nobody, and when the first of the others will not any more."""
        held = {
            kind: lane.held_until(self._most(kind), self._max_wait_s, now)
            for kind, lane in self._forward.items()
            if lane.heap
        }
        free = {kind: self._forward[kind] for kind, until in held.items() if until <= now}
        return free, min(held.values(), default=float("inf"))

    def _first(self, lanes: Mapping[Kind, _Lane[T]]) -> Kind:
        return min(lanes, key=lambda kind: lanes[kind].heap[0][:2])

    def _take(self, lane: _Lane[T], kind: Kind) -> list[T]:
        self._turn = max(self._turn, lane.heap[0][0])
        tasks = lane.take(self._most(kind))
        self._forget()
        return tasks

    def _forget(self) -> None:
        """Senders and lanes that have had nothing to say for long are not remembered."""
        if len(self._next_turn) > 10_000:
            self._next_turn = {w: at for w, at in self._next_turn.items() if at > self._turn}
        if len(self._forward) > 1000:
            self._forward = {kind: lane for kind, lane in self._forward.items() if lane.heap}

    def _most(self, kind: Kind) -> int:
        if self._max_samples is not None:
            return self._max_samples
        return max(1, self._max_tokens // max(1, kind.tokens))

    def _lanes(self) -> Iterator[_Lane[ForwardTask | OwnTask] | _Lane[BackwardTask]]:
        yield from self._forward.values()
        yield from self._again.values()
