"""The engine's worker: one thread, one batch after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from protocol.errors import Busy
from split_server.engine import compute
from split_server.engine.api import StepKey
from split_server.engine.body_cache import BodyCache
from split_server.engine.memory import StepSizes
from split_server.engine.metrics import EngineFigures, Turn
from split_server.engine.scheduler import Batch, Schedule
from split_server.engine.steps import Graph, RetainedSteps
from split_server.engine.tasks import BackwardTask, Forwarded, ForwardTask, OwnTask, Task
from split_server.runtime.device import Ahead, Placement, used_here

Item = TypeVar("Item")

Part = TypeVar("Part")


@dataclass(frozen=True)
class _Prepared:
    """A forward's input as it lies on the device."""

    task: ForwardTask
    smashed: Tensor  # [B, T, D]
    prompts: Tensor | None  # [L, P, D]


class Executor:
    """Joins tasks of one kind, computes, and parts them again.

    What goes wrong with a batch of several is tried again with each of them alone: a task's
    failure is its own.

    Args:
        bodies: that tasks run through.
        placement: where.
        sizes: what a forward keeps, where it is known; counting slows it down.
    """

    def __init__(self, bodies: BodyCache, placement: Placement, sizes: StepSizes) -> None:
        self._bodies = bodies
        self._placement = placement
        self._sizes = sizes
        self._ahead = Ahead(placement.device)

    def run(self, batch: Batch) -> None:
        """Compute a batch, or queue it on a GPU; all its tasks are done, or have failed, after."""
        tasks = batch.tasks
        if isinstance(tasks[0], OwnTask):
            _alone(cast(Sequence[OwnTask], tasks))
        elif isinstance(tasks[0], ForwardTask):
            self._forward(cast(Sequence[ForwardTask], tasks))
        elif batch.graph is None:
            self._again(cast(Sequence[BackwardTask], tasks))
        else:
            self._through(batch.graph, cast(Sequence[BackwardTask], tasks))
        self._ahead.queued()

    def _forward(self, tasks: Sequence[ForwardTask]) -> None:
        prepared = [one for task in tasks if (one := self._prepare(task)) is not None]
        for one, part in _each(prepared, self._run_forward, lambda one: one.task):
            _hand_over(one.task, part, one.task.done)

    def _prepare(self, task: ForwardTask) -> _Prepared | None:
        try:
            smashed = self._placed(task.smashed)
            prompts = task.prompts(smashed)
            return _Prepared(task, smashed, None if prompts is None else self._placed(prompts))
        except Exception as error:
            task.fail(error)
            return None

    def _run_forward(self, prepared: Sequence[_Prepared]) -> list[Forwarded]:
        kind = prepared[0].task.kind
        body = self._bodies.get(kind.body)
        smashed = _joined([one.smashed for one in prepared])  # [B, T, D]
        prompts = _joined_prompts([(one.prompts, one.task.samples) for one in prepared])
        rows = _rows([one.task.samples for one in prepared])
        graph = None
        if kind.keep == "graph":
            began = time.perf_counter()
            sized = kind.body, kind.num_tokens
            known = self._sizes.measured(sized, smashed)
            leaf, features, nbytes = compute.run_forward(
                body, smashed, prompts, kind.num_tokens, known
            )
            if known is None:
                self._sizes.learn(sized, smashed, nbytes)
            keys = [cast(StepKey, one.task.key) for one in prepared]
            seconds = time.perf_counter() - began
            graph = Graph(leaf, features, dict(zip(keys, rows, strict=True)), nbytes, seconds)
        else:
            features = compute.run_inference(body, smashed, prompts, kind.num_tokens)
        return [
            Forwarded(features.detach()[part], one.smashed, one.prompts, graph)
            for one, part in zip(prepared, rows, strict=True)
        ]

    def _through(self, graph: Graph, tasks: Sequence[BackwardTask]) -> None:
        """Backward through a graph that was kept; it is spent then, whatever comes of it."""
        result: Tensor | None
        try:
            result = compute.run_backward(graph, self._whole_gradient(graph, tasks))
        except Exception as error:
            if len(tasks) == 1:
                tasks[0].fail(error)
                return
            result = None  # and what the error holds on to goes before anything is tried again
        if result is None:
            self._again(tasks)
            return
        for task in tasks:
            _hand_over(task, result[graph.rows[task.key]], task.done)

    def _whole_gradient(self, graph: Graph, tasks: Sequence[BackwardTask]) -> Tensor:
        """The gradient of all the graph's features; that of samples which lack theirs is 0."""
        if len(tasks) == len(graph.rows) == 1:
            return self._placed(tasks[0].gradients)
        whole = torch.zeros_like(graph.features)
        for task in tasks:
            whole[graph.rows[task.key]] = self._placed(task.gradients)
        return whole

    def _again(self, tasks: Sequence[BackwardTask]) -> None:
        """Backward of steps whose graph was not kept: their forward is run again."""
        for task, part in _each(tasks, self._run_again, lambda task: task):
            _hand_over(task, part, task.done)

    def _run_again(self, tasks: Sequence[BackwardTask]) -> list[Tensor]:
        kind = tasks[0].kind
        body = self._bodies.get(kind.body)
        smashed = _joined([task.step.smashed for task in tasks])
        prompts = _joined_prompts([(task.step.prompts, task.samples) for task in tasks])
        leaf, features, _ = compute.run_forward(
            body, smashed, prompts, kind.num_tokens, known_bytes=0
        )
        rows = _rows([task.samples for task in tasks])
        graph = Graph(leaf, features, {}, 0, 0.0)
        gradients = _joined([self._placed(task.gradients) for task in tasks])
        result = compute.run_backward(graph, gradients)
        return [result[part] for part in rows]

    def _placed(self, tensor: Tensor) -> Tensor:
        place = self._placement
        return used_here(tensor).to(place.device, place.flowing, non_blocking=True)


def _alone(tasks: Sequence[OwnTask]) -> None:
    for task in tasks:
        try:
            task.run()
        except Exception as error:
            task.fail(error)


def _each(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Part]],
    task: Callable[[Item], Task],
) -> list[tuple[Item, Part]]:
    """What comes of each of the items, computed together, or else one by one."""
    if not items:
        return []
    try:
        return list(zip(items, run(items), strict=True))
    except Exception as error:
        if len(items) == 1:
            task(items[0]).fail(error)
            return []
    return [found for item in items for found in _each([item], run, task)]


def _hand_over(task: Task, part: Part, done: Callable[[Part], None]) -> None:
    try:
        done(part)
    except Exception as error:
        task.fail(error)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _joined_prompts(parts: Sequence[tuple[Tensor | None, int]]) -> Tensor | None:
    """Each participant's prompts [L, P, D] beside each of its samples: [B, L, P, D]."""
    spread = [p.expand(samples, *p.shape) for p, samples in parts if p is not None]
    return torch.cat(spread) if spread else None


def _rows(samples: Sequence[int]) -> list[slice]:
    ends = [sum(samples[: place + 1]) for place in range(len(samples))]
    return [slice(end - size, end) for end, size in zip(ends, samples, strict=True)]


class Worker:
    """Takes batches from the schedule and runs them.

    Args:
        schedule: of the waiting tasks.
        executor: runs a batch.
        figures: count what was run.
        lock: guards the schedule; notified when a task comes.
        steps: that are retained: whose gradients may still come.
        queued_bytes: the most that may wait.
    """

    def __init__(
        self,
        schedule: Schedule,
        executor: Executor,
        figures: EngineFigures,
        lock: threading.Condition,
        steps: RetainedSteps,
        queued_bytes: int,
    ) -> None:
        self._schedule = schedule
        self._executor = executor
        self._figures = figures
        self._lock = lock
        self._steps = steps
        self._queued_limit = queued_bytes
        self._seconds_per_sample = 0.01  # a running mean
        self._closed = False
        self.queued_bytes = 0
        self._thread = threading.Thread(target=self._work, name="split-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # Under the lock

    def add(self, task: Task) -> None:
        """Put a task into the queue: one that goes on with a job is refused at the end alone."""
        if self._closed:
            task.fail(_stopping())
            return
        now = time.monotonic()
        if isinstance(task, ForwardTask | OwnTask):
            self._schedule.add_forward(task, now)
        elif isinstance(task, BackwardTask):
            self._schedule.add_backward(task, now)
        self.queued_bytes += task.nbytes
        self._lock.notify()

    def require_room(self, nbytes: int) -> None:
        """Refuse a job for whose tensors the queue has no room. One alone is always let in.

        Raises:
            Busy: the queue is full, or the engine stops.
        """
        if self._closed:
            raise _stopping()
        if self.queued_bytes and self.queued_bytes + nbytes > self._queued_limit:
            raise self.busy_error("the queue is full")

    def busy_error(self, why: str) -> Busy:
        """To be asked again when what waits now has been worked off."""
        self._figures.refused(Busy.code)
        wait = self._seconds_per_sample * (self._schedule.samples + 1)
        return Busy(f"{why}; try again later", retry_after_s=round(min(max(wait, 0.1), 30.0), 2))

    # Without it

    def close(self) -> None:
        """Stop after the batch at work. What waits is refused."""
        with self._lock:
            self._closed = True
            waiting = self._schedule.drain()
            self._lock.notify_all()
        for task in waiting:
            task.fail(_stopping())
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            began = time.monotonic()
            try:
                self._executor.run(batch)
            except Exception as error:  # whatever it is, nobody waits for ever
                for task in batch.tasks:
                    task.fail(error)
            self._count(batch, began, time.monotonic() - began)
            del batch  # what it holds is not kept while nothing is to do

    def _next(self) -> Batch | None:
        """The next batch, waited for; None: there is none any more."""
        with self._lock:
            while not self._closed:
                found = self._schedule.next(time.monotonic(), self._steps.wanted)
                if isinstance(found, Batch):
                    self._taken(found)
                    return found
                self._lock.wait(min(found, threading.TIMEOUT_MAX))
            return None

    def _taken(self, batch: Batch) -> None:
        self.queued_bytes -= sum(task.nbytes for task in batch.tasks)
        if batch.graph is not None:
            own = {task.key for task in batch.tasks if isinstance(task, BackwardTask)}
            self._steps.spend(batch.graph, own)

    def _count(self, batch: Batch, began: float, seconds: float) -> None:
        turns = [Turn(t.sender[0], t.samples, began - t.arrived) for t in batch.tasks]
        self._figures.ran(_work_of(batch), turns, seconds)
        samples = sum(turn.samples for turn in turns)
        with self._lock:
            now = seconds / max(1, samples)
            self._seconds_per_sample += 0.1 * (now - self._seconds_per_sample)


def _stopping() -> Busy:
    return Busy("the server is shutting down", retry_after_s=5.0)


def _work_of(batch: Batch) -> str:
    first = batch.tasks[0]
    if isinstance(first, OwnTask):
        return first.work
    if isinstance(first, ForwardTask):
        return "inference" if first.kind.keep == "nothing" else "forward"
    return "recompute" if batch.graph is None else "backward"
