"""Runs a batch through its body, and gives each task its part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from split_server.devices import Placement
from split_server.engine import compute
from split_server.engine.bodies import Bodies
from split_server.engine.schedule import Batch
from split_server.engine.steps import Graph, StepKey
from split_server.engine.tasks import BackwardTask, Forwarded, ForwardTask, OwnTask, Task
from split_server.streams import Ahead, used_here

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

    def __init__(self, bodies: Bodies, placement: Placement, sizes: compute.StepSizes) -> None:
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
            sized = kind.body, kind.leading
            known = self._sizes.measured(sized, smashed)
            leaf, features, nbytes = compute.run_forward(
                body, smashed, prompts, kind.leading, known
            )
            if known is None:
                self._sizes.learn(sized, smashed, nbytes)
            keys = [cast(StepKey, one.task.key) for one in prepared]
            seconds = time.perf_counter() - began
            graph = Graph(leaf, features, dict(zip(keys, rows, strict=True)), nbytes, seconds)
        else:
            features = compute.run_inference(body, smashed, prompts, kind.leading)
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
        leaf, features, _ = compute.run_forward(body, smashed, prompts, kind.leading, known_bytes=0)
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
