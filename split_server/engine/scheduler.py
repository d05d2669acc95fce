"""The schedule: which tasks run next. Backwards first, then the oldest; senders take turns."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from split_server.engine.api import StepKey
from split_server.engine.steps import Graph
from split_server.engine.tasks import BackwardTask, ForwardTask, Kind, Sender, SessionTask, Task
from split_server.engine.turns import Turns

_MAX_GRAPH_WAIT_S = 3.0  # the first forward is slow for reasons that the backward does not share

_PEER_WINDOW_S = 1.0  # a sender seen within this time is expected to send again

_MAX_SENDERS_SEEN = 1000

_BUSY_WAIT_FACTOR = 20  # while other tasks wait, a graph waits this many times longer

T = TypeVar("T", bound=Task)

StepsOf = Callable[[Graph], set[StepKey]]  # the steps that may still send a graph's gradients


class PendingGraph:
    """The gradients of one graph that have arrived, and how long to wait for the others.

    Waiting leaves the device idle; not waiting costs the latecomers another forward. So the wait is
    as long as that forward took, which costs at most twice the better choice (the ski rental rule).
    """

    def __init__(self, graph: Graph, min_wait_s: float) -> None:
        self.graph = graph
        self.wait_s = max(min_wait_s, min(graph.seconds, _MAX_GRAPH_WAIT_S))
        self.tasks: dict[StepKey, BackwardTask] = {}
        self.first_at = 0.0  # seconds on the monotonic clock

    @property
    def samples(self) -> int:
        return sum(task.samples for task in self.tasks.values())

    def add(self, task: BackwardTask) -> None:
        if not self.tasks:
            self.first_at = task.arrived
        self.tasks[task.key] = task

    def is_complete(self, steps_of: StepsOf) -> bool:
        """Whether the gradients of all the graph's steps have arrived."""
        return steps_of(self.graph) <= self.tasks.keys()


@dataclass(frozen=True)
class Batch:
    """Tasks that run together, and the graph that they run backward, if any."""

    tasks: Sequence[Task]
    graph: Graph | None = None


@dataclass
class _Lane(Generic[T]):
    """Queued tasks of one kind, the next task first."""

    heap: list[tuple[float, int, T]] = field(default_factory=list)
    last_seen: dict[Sender, float] = field(default_factory=dict)  # on the monotonic clock
    samples: int = 0

    def add(self, turn: float, number: int, task: T) -> None:
        heapq.heappush(self.heap, (turn, number, task))
        self.last_seen[task.sender] = task.arrived
        self.samples += task.samples

    def take(self, max_samples: int) -> list[T]:
        """Remove and return the next tasks: at least one, else at most ``max_samples`` samples."""
        taken: list[T] = []
        samples = 0
        while self.heap and (not taken or samples + self.heap[0][2].samples <= max_samples):
            task = heapq.heappop(self.heap)[2]
            samples += task.samples
            taken.append(task)
        self.samples -= samples
        return taken

    def ready_at(self, max_samples: int, max_wait_s: float, now: float) -> float:
        """Return when the lane need not wait any longer for its recent senders."""
        if len(self.last_seen) > _MAX_SENDERS_SEEN:
            self._forget_old_senders(now)
        oldest = min(task.arrived for _, _, task in self.heap)
        if self.samples >= max_samples or oldest + max_wait_s <= now:
            return now
        waiting = {task.sender for _, _, task in self.heap}
        self._forget_old_senders(now)
        return oldest + max_wait_s if self.last_seen.keys() - waiting else now

    def _forget_old_senders(self, now: float) -> None:
        self.last_seen = {s: at for s, at in self.last_seen.items() if at + _PEER_WINDOW_S > now}


class Schedule:
    """The queued tasks. Not thread-safe: callers hold the engine's lock.

    Senders take turns by the samples that they have had, and addresses likewise (`Turns`): a sender
    of many samples waits behind a sender of few, and no task starves.

    Args:
        max_tokens: tokens per batch beyond which the device gains nothing.
        max_samples: samples per batch; None: as many as ``max_tokens`` allow.
        max_wait_s: longest wait of a task for other tasks while the device is idle.
    """

    def __init__(self, max_tokens: int, max_samples: int | None, max_wait_s: float) -> None:
        self._max_tokens = max_tokens
        self._max_samples = max_samples
        self._max_wait_s = max_wait_s
        self._forward: dict[Kind, _Lane[ForwardTask | SessionTask]] = {}
        self._recompute: dict[Kind, _Lane[BackwardTask]] = {}  # backwards without a graph
        self._graphs: dict[Graph, PendingGraph] = {}
        self._numbers = itertools.count()
        self.turns = Turns()

    def __len__(self) -> int:
        queued = sum(len(lane.heap) for lane in self._lanes())
        return queued + sum(len(pending.tasks) for pending in self._graphs.values())

    @property
    def samples(self) -> int:
        """Number of queued samples."""
        queued = sum(lane.samples for lane in self._lanes())
        return queued + sum(pending.samples for pending in self._graphs.values())

    def add_forward(self, task: ForwardTask | SessionTask, now: float) -> None:
        """Queue a forward, or either direction of a session: no graph waits for it to free it."""
        task.arrived = now
        lane = self._forward.setdefault(task.kind, _Lane())
        lane.add(self.turns.give(task, task.arrived), next(self._numbers), task)

    def add_backward(self, task: BackwardTask, now: float) -> None:
        """Queue a backward with the others of its graph, or with others that lack a graph."""
        task.arrived = now
        if (graph := task.step.graph) is None:
            self._add_recompute(task)
            return
        pending = self._graphs.setdefault(graph, PendingGraph(graph, self._max_wait_s))
        pending.add(task)

    def next(self, now: float, steps_of: StepsOf) -> Batch | float:
        """Return the next batch, or how many seconds to wait for it unless a task arrives.

        Args:
            now: seconds on the monotonic clock.
            steps_of: returns the steps that may still send a graph's gradients.
        """
        for pending in self._graphs.values():  # the oldest first
            deadline = pending.first_at + _BUSY_WAIT_FACTOR * pending.wait_s
            if pending.is_complete(steps_of) or deadline <= now:
                return self._take_graph(pending, steps_of)
        if self._recompute:
            return self._take_recompute()
        ready, until = self._ready_lanes(now)
        if ready:
            kind = self._first(ready)
            forwards: list[ForwardTask | SessionTask] = self._take(ready[kind], kind)
            return Batch(forwards)
        for pending in self._graphs.values():
            if pending.first_at + pending.wait_s <= now:
                return self._take_graph(pending, steps_of)
            until = min(until, pending.first_at + pending.wait_s)
        return until - now

    def drain(self) -> list[Task]:
        """Remove and return all tasks."""
        tasks: list[Task] = [task for lane in self._lanes() for _, _, task in lane.heap]
        tasks += [task for pending in self._graphs.values() for task in pending.tasks.values()]
        self._forward.clear()
        self._recompute.clear()
        self._graphs.clear()
        return tasks

    def _take_graph(self, pending: PendingGraph, steps_of: StepsOf) -> Batch:
        """Take a graph's backwards; if most gradients are missing, recompute those that arrived.

        The graph's backward costs all its samples; recomputing costs the arrived samples twice.
        """
        del self._graphs[pending.graph]
        tasks = list(pending.tasks.values())
        missing_steps = steps_of(pending.graph) - pending.tasks.keys()
        rows = pending.graph.rows
        missing = sum(rows[key].stop - rows[key].start for key in missing_steps)
        if pending.samples >= missing:  # a forward costs as much as a backward
            return Batch(tasks, pending.graph)
        for task in tasks:
            self._add_recompute(task)
        return self._take_recompute()

    def _take_recompute(self) -> Batch:
        kind = self._first(self._recompute)
        tasks: list[BackwardTask] = self._take(self._recompute[kind], kind)
        if not self._recompute[kind].heap:
            del self._recompute[kind]
        return Batch(tasks)

    def _add_recompute(self, task: BackwardTask) -> None:
        lane = self._recompute.setdefault(task.kind, _Lane())
        lane.add(self.turns.give(task, task.arrived), next(self._numbers), task)

    def _ready_lanes(
        self, now: float
    ) -> tuple[dict[Kind, _Lane[ForwardTask | SessionTask]], float]:
        """The lanes that need not wait any longer, and when the next lane will be ready."""
        ready_at = {
            kind: lane.ready_at(self._max_batch_samples(kind), self._max_wait_s, now)
            for kind, lane in self._forward.items()
            if lane.heap
        }
        ready = {kind: self._forward[kind] for kind, at in ready_at.items() if at <= now}
        return ready, min(ready_at.values(), default=float("inf"))

    def _first(self, lanes: Mapping[Kind, _Lane[T]]) -> Kind:
        return min(lanes, key=lambda kind: lanes[kind].heap[0][:2])

    def _take(self, lane: _Lane[T], kind: Kind) -> list[T]:
        self.turns.take(lane.heap[0][0])
        tasks = lane.take(self._max_batch_samples(kind))
        self._forget_idle()
        return tasks

    def _forget_idle(self) -> None:
        """Forget the empty lanes, once there are many."""
        if len(self._forward) > 1000:
            self._forward = {kind: lane for kind, lane in self._forward.items() if lane.heap}

    def _max_batch_samples(self, kind: Kind) -> int:
        if self._max_samples is not None:
            return self._max_samples
        return max(1, self._max_tokens // max(1, kind.tokens))

    def _lanes(self) -> Iterator[_Lane[ForwardTask | SessionTask] | _Lane[BackwardTask]]:
        yield from self._forward.values()
        yield from self._recompute.values()
