"""The engine's worker thread: takes batches from the schedule and runs them one by one."""

from __future__ import annotations

import threading
import time
from collections import Counter
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
from split_server.engine.tasks import (
    BackwardTask,
    Forwarded,
    ForwardTask,
    Sender,
    SessionTask,
    Task,
)
from split_server.runtime.device import BatchPacer, Placement, used_here

Item = TypeVar("Item")

Part = TypeVar("Part")


@dataclass(frozen=True)
class _Prepared:
    """A forward's input on the device."""

    task: ForwardTask
    smashed: Tensor  # [B, T, D]
    prompts: Tensor | None  # [L, P, D]


class Executor:
    """Joins the tasks of a batch, computes, and splits the result.

    If a batch of several tasks fails, each task runs again alone, so that one task's failure does
    not affect the others.

    Args:
        bodies: the frozen bodies.
        placement: device and dtype of the bodies.
        sizes: bytes that forwards save; counting them slows a forward down.
    """

    def __init__(self, bodies: BodyCache, placement: Placement, sizes: StepSizes) -> None:
        self._bodies = bodies
        self._placement = placement
        self._sizes = sizes
        self._pacer = BatchPacer(placement.device)

    def run(self, batch: Batch) -> None:
        """Compute a batch, or queue it on a GPU; then each of its tasks is done or has failed."""
        tasks = batch.tasks
        if isinstance(tasks[0], SessionTask):
            _run_alone(cast(Sequence[SessionTask], tasks))
        elif isinstance(tasks[0], ForwardTask):
            self._forward(cast(Sequence[ForwardTask], tasks))
        elif batch.graph is None:
            self._recompute(cast(Sequence[BackwardTask], tasks))
        else:
            self._backward(batch.graph, cast(Sequence[BackwardTask], tasks))
        self._pacer.wait_for_previous()

    def _forward(self, tasks: Sequence[ForwardTask]) -> None:
        prepared = [item for task in tasks if (item := self._prepare(task)) is not None]
        for item, part in _run_together(prepared, self._run_forward, lambda item: item.task):
            _finish(item.task, part, item.task.done)

    def _prepare(self, task: ForwardTask) -> _Prepared | None:
        try:
            smashed = self._move(task.smashed)
            prompts = None if task.prompts is None else self._move(task.prompts(smashed))
            return _Prepared(task, smashed, prompts)
        except Exception as error:
            task.fail(error)
            return None

    def _run_forward(self, prepared: Sequence[_Prepared]) -> list[Forwarded]:
        kind = prepared[0].task.kind
        body = self._bodies.get(kind.body)
        smashed = _join([item.smashed for item in prepared])  # [B, T, D]
        prompts = _join_prompts([(item.prompts, item.task.samples) for item in prepared])
        rows = _rows([item.task.samples for item in prepared])
        graph = None
        if kind.retention == "graph":
            began = time.perf_counter()
            size_key = kind.body, kind.num_tokens
            known = self._sizes.get_measured(size_key, smashed)
            leaf, features, nbytes = compute.run_forward(
                body, smashed, prompts, kind.num_tokens, known
            )
            if known is None:
                self._sizes.learn(size_key, smashed, nbytes)
            keys = [cast(StepKey, item.task.key) for item in prepared]
            seconds = time.perf_counter() - began
            graph = Graph(leaf, features, dict(zip(keys, rows, strict=True)), nbytes, seconds)
        else:
            features = compute.run_inference(body, smashed, prompts, kind.num_tokens)
        return [
            Forwarded(features.detach()[part], item.smashed, item.prompts, graph)
            for item, part in zip(prepared, rows, strict=True)
        ]

    def _backward(self, graph: Graph, tasks: Sequence[BackwardTask]) -> None:
        """Run a retained graph backward, which uses it up, even if it fails."""
        result: Tensor | None
        try:
            result = compute.run_backward(graph, self._join_gradients(graph, tasks))
        except Exception as error:
            if len(tasks) == 1:
                tasks[0].fail(error)
                return
            result = None  # recompute after this block, which frees what the error refers to
        if result is None:
            self._recompute(tasks)
            return
        for task in tasks:
            _finish(task, result[graph.rows[task.key]], task.done)

    def _join_gradients(self, graph: Graph, tasks: Sequence[BackwardTask]) -> Tensor:
        """Join the gradients of a graph's features; those of absent steps are 0."""
        if len(tasks) == len(graph.rows) == 1:
            return self._move(tasks[0].gradients)
        joined = torch.zeros_like(graph.features)
        for task in tasks:
            joined[graph.rows[task.key]] = self._move(task.gradients)
        return joined

    def _recompute(self, tasks: Sequence[BackwardTask]) -> None:
        """Run steps without a graph forward again, then backward."""
        for task, part in _run_together(tasks, self._run_recompute, lambda task: task):
            _finish(task, part, task.done)

    def _run_recompute(self, tasks: Sequence[BackwardTask]) -> list[Tensor]:
        kind = tasks[0].kind
        body = self._bodies.get(kind.body)
        smashed = _join([task.step.smashed for task in tasks])
        prompts = _join_prompts([(task.step.prompts, task.samples) for task in tasks])
        leaf, features, _ = compute.run_forward(
            body, smashed, prompts, kind.num_tokens, known_bytes=0
        )
        rows = _rows([task.samples for task in tasks])
        graph = Graph(leaf, features, {}, 0, 0.0)
        gradients = _join([self._move(task.gradients) for task in tasks])
        result = compute.run_backward(graph, gradients)
        return [result[part] for part in rows]

    def _move(self, tensor: Tensor) -> Tensor:
        place = self._placement
        return used_here(tensor).to(place.device, place.flowing, non_blocking=True)


def _run_alone(tasks: Sequence[SessionTask]) -> None:
    for task in tasks:
        try:
            task.run()
        except Exception as error:
            task.fail(error)


def _run_together(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Part]],
    task_of: Callable[[Item], Task],
) -> list[tuple[Item, Part]]:
    """Run items in one batch; if it fails, each alone. Return the items that did not fail."""
    if not items:
        return []
    try:
        return list(zip(items, run(items), strict=True))
    except Exception as error:
        if len(items) == 1:
            task_of(items[0]).fail(error)
            return []
    return [pair for item in items for pair in _run_together([item], run, task_of)]


def _finish(task: Task, part: Part, done: Callable[[Part], None]) -> None:
    try:
        done(part)
    except Exception as error:
        task.fail(error)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _join_prompts(parts: Sequence[tuple[Tensor | None, int]]) -> Tensor | None:
    """Expand each participant's prompts [L, P, D] to its samples and join them: [B, L, P, D]."""
    expanded = [p.expand(samples, *p.shape) for p, samples in parts if p is not None]
    return torch.cat(expanded) if expanded else None


def _rows(samples: Sequence[int]) -> list[slice]:
    ends = [sum(samples[: place + 1]) for place in range(len(samples))]
    return [slice(end - size, end) for end, size in zip(ends, samples, strict=True)]


class Worker:
    """Takes batches from the schedule and runs them.

    Args:
        schedule: the queued tasks.
        executor: runs a batch.
        figures: counts batches.
        lock: guards the schedule; notified when a task arrives.
        steps: the retained steps, whose gradients may still arrive.
        queued_bytes: limit of the queued tensors.
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
        self._queued_by: Counter[object] = Counter()  # bytes, by address
        self._thread = threading.Thread(target=self._run_batches, name="split-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # Under the lock

    def add(self, task: Task) -> None:
        """Queue a task, without a check of the queue's limit: its job is already under way."""
        if self._closed:
            task.fail(_shutdown_error())
            return
        now = time.monotonic()
        if isinstance(task, ForwardTask | SessionTask):
            self._schedule.add_forward(task, now)
        elif isinstance(task, BackwardTask):
            self._schedule.add_backward(task, now)
        self.queued_bytes += task.nbytes
        task.address = self._schedule.turns.address_of(task.sender)
        self._queued_by[task.address] += task.nbytes
        self._lock.notify()

    def check_queue(self, sender: Sender, nbytes: int) -> None:
        """Check that ``nbytes`` more tensors fit the queue. An empty queue takes any size.

        An address may queue as much as it leaves free (Choudhury and Hahne, 1998), so that no
        number of requests from one address closes the queue to others.

        Raises:
            Busy: the queue is full, or the engine stops.
        """
        if self._closed:
            raise _shutdown_error()
        free = self._queued_limit - self.queued_bytes
        own = self._queued_by[self._schedule.turns.address_of(sender)]
        if self.queued_bytes and (nbytes > free or (own and own + nbytes > free)):
            raise self.busy_error("the queue is full")

    def busy_error(self, reason: str) -> Busy:
        """Build a `Busy` error; ``retry_after_s`` is the estimated time to empty the queue."""
        self._figures.count_refusal(Busy.code)
        wait = self._seconds_per_sample * (self._schedule.samples + 1)
        return Busy(f"{reason}; retry later", retry_after_s=round(min(max(wait, 0.1), 30.0), 2))

    # Without the lock

    def close(self) -> None:
        """Stop after the running batch. Queued tasks fail with `Busy`."""
        with self._lock:
            self._closed = True
            queued = self._schedule.drain()
            self._lock.notify_all()
        for task in queued:
            task.fail(_shutdown_error())
        self._thread.join(timeout=30)

    def _run_batches(self) -> None:
        while (batch := self._wait_for_batch()) is not None:
            began = time.monotonic()
            try:
                self._executor.run(batch)
            except Exception as error:  # of any kind: otherwise the requests would wait for ever
                for task in batch.tasks:
                    task.fail(error)
            self._count(batch, began, time.monotonic() - began)
            del batch  # frees its tensors before the next wait

    def _wait_for_batch(self) -> Batch | None:
        """Return the next batch; None: the engine has stopped."""
        with self._lock:
            while not self._closed:
                batch_or_wait = self._schedule.next(time.monotonic(), self._steps.steps_of)
                if isinstance(batch_or_wait, Batch):
                    self._take(batch_or_wait)
                    return batch_or_wait
                self._lock.wait(min(batch_or_wait, threading.TIMEOUT_MAX))
            return None

    def _take(self, batch: Batch) -> None:
        for task in batch.tasks:
            self.queued_bytes -= task.nbytes
            self._queued_by[task.address] -= task.nbytes
            if self._queued_by[task.address] <= 0:
                del self._queued_by[task.address]
        if batch.graph is not None:
            keys = {task.key for task in batch.tasks if isinstance(task, BackwardTask)}
            self._steps.use_up(batch.graph, keys)

    def _count(self, batch: Batch, began: float, seconds: float) -> None:
        turns = [Turn(t.sender[0], t.samples, began - t.arrived) for t in batch.tasks]
        self._figures.count_batch(_work_of(batch), turns, seconds)
        samples = sum(turn.samples for turn in turns)
        with self._lock:
            latest = seconds / max(1, samples)
            self._seconds_per_sample += 0.1 * (latest - self._seconds_per_sample)


def _shutdown_error() -> Busy:
    return Busy("the server is shutting down", retry_after_s=5.0)


def _work_of(batch: Batch) -> str:
    first = batch.tasks[0]
    if isinstance(first, SessionTask):
        return first.work
    if isinstance(first, ForwardTask):
        return "inference" if first.kind.retention == "nothing" else "forward"
    return "recompute" if batch.graph is None else "backward"
