"""Jobs of many participants in one batch: the same results as alone, and no effect on others."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import Busy, InternalError, StepLost, TooLarge
from split_model.backbone.weights import open_backbone
from split_model.parts.body import Body
from split_model.parts.build import build_body
from split_server.engine import compute
from split_server.engine.api import BackwardJob, ForwardJob, InferJob, StepKey
from split_server.engine.engine import Engine
from split_server.engine.prompt_sessions import PromptSessions
from split_server.models.body_key import BodyKey
from split_server.runtime.device import Placement
from tests.support.engine import (
    BATCHES,
    Case,
    MakeEngine,
    engines,
    gradient_of,
    smashed,
)
from tests.support.federation import run_settings
from tests.support.federation import smashed as with_prompts

MODES = ["auto", "retained", "recompute"]

PEOPLE = [f"p{number}" for number in range(5)]


@contextmanager
def busy_worker(engine: Engine, key: BodyKey, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the worker busy with another job, so that the next jobs wait together."""
    may_finish, at_work = threading.Event(), threading.Event()
    real = compute.run_inference

    def blocked(*job: Any) -> Tensor:
        at_work.set()
        may_finish.wait(20)
        return real(*job)

    with monkeypatch.context() as patch:
        patch.setattr(compute, "run_inference", blocked)
        loop = threading.Thread(
            target=lambda: asyncio.run(engine.infer(InferJob("r0", "p0", key, with_prompts())))
        )
        loop.start()
        assert at_work.wait(20)
        yield
        may_finish.set()
        loop.join(20)


async def together(
    engine: Engine,
    key: BodyKey,
    monkeypatch: pytest.MonkeyPatch,
    jobs: Sequence[Awaitable[Tensor]],
) -> list[Any]:
    """Submit jobs that all wait before the first runs; return their responses."""
    with busy_worker(engine, key, monkeypatch):
        tasks = [asyncio.ensure_future(job) for job in jobs]
        async with asyncio.timeout(20):
            while len(engine._schedule) < len(tasks):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    return await asyncio.gather(*tasks, return_exceptions=True)


def forward(key: BodyKey, tensor: Tensor, who: str) -> ForwardJob:
    return ForwardJob(StepKey("r1", who, "s"), key, tensor, fingerprint=1)


def backward(key: BodyKey, tensor: Tensor, who: str) -> BackwardJob:
    return BackwardJob(StepKey("r1", who, "s"), key, tensor, fingerprint=2)


async def mean_batch(engine: Engine, tasks: int) -> float:
    """Return the mean batch size of this many tasks, once they have been counted."""
    async with asyncio.timeout(20):
        while (figures := engine.figures("r1")).tasks < tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return figures.batch_samples / figures.tasks


def sizes(tensors: Sequence[Tensor]) -> int:
    return sum(len(tensor) for tensor in tensors)


@functools.cache
def body_of(key: BodyKey, dtype: torch.dtype) -> Body:
    return build_body(key.settings, open_backbone(key.backbone), dtype=dtype)


def by_itself(
    key: BodyKey, tensor: Tensor, gradient: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute features and input gradient with the body itself."""
    body = body_of(key, dtype)
    leaf = tensor.clone().requires_grad_()
    features = body(leaf)
    features.backward(gradient)
    assert leaf.grad is not None
    return features.detach(), leaf.grad


@pytest.mark.parametrize(
    ("mode", "dtype", "near"),
    [*((mode, torch.float32, 1e-5) for mode in MODES), ("auto", torch.bfloat16, 2e-2)],
)
def test_joined_steps_equal_the_body_alone(
    key: BodyKey, monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype, near: float
) -> None:
    inputs = [with_prompts(batch=number + 1, seed=number) for number in range(len(PEOPLE))]
    gradients = [with_prompts(batch=number + 1, seed=50 + number) for number in range(len(PEOPLE))]

    async def steps() -> tuple[list[Tensor], list[Tensor]]:
        features = await together(
            engine,
            key,
            monkeypatch,
            [engine.submit(forward(key, x, who)) for x, who in zip(inputs, PEOPLE, strict=True)],
        )
        assert await mean_batch(engine, len(inputs)) == sizes(inputs), "they were one batch"
        jobs = [engine.submit(backward(key, g, w)) for g, w in zip(gradients, PEOPLE, strict=True)]
        return features, await together(engine, key, monkeypatch, jobs)

    with engines(Placement(torch.device("cpu"), dtype)) as make:
        engine = make(backward=mode)
        features, results = asyncio.run(steps())
    for number, tensor in enumerate(inputs):
        expected, gradient = by_itself(key, tensor, gradients[number], dtype)
        torch.testing.assert_close(features[number], expected, rtol=near, atol=near)
        torch.testing.assert_close(results[number], gradient, rtol=near, atol=near)
    asyncio.run(mean_batch(engine, 2 * len(PEOPLE)))
    assert engine.figures("r1").recomputed == (sizes(inputs) if mode == "recompute" else 0)
    assert engine._tracker.memory.taken == engine._worker.queued_bytes == 0


def test_jobs_of_runs_with_the_same_cut_share_a_batch(
    make: MakeEngine, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run_settings()
    other = own.model_copy(update={"model": own.model.model_copy(update={"num_classes": 7})})
    keys = [BodyKey.of(str(backbone), settings) for settings in (own, other)]
    inputs = [with_prompts(batch=number + 2, seed=number) for number in range(2)]
    engine = make()

    async def steps() -> list[Tensor]:
        jobs = [
            ForwardJob(StepKey(run, "p1", "s"), key, tensor, fingerprint=1)
            for run, key, tensor in zip(("r1", "r2"), keys, inputs, strict=True)
        ]
        return await together(engine, keys[0], monkeypatch, [engine.submit(job) for job in jobs])

    found = asyncio.run(steps())
    engine.close()  # a batch is counted after its responses
    for run, key, tensor, features in zip(("r1", "r2"), keys, inputs, found, strict=True):
        assert engine.figures(run).batch_samples == sizes(inputs), "they were one batch"
        expected, _ = by_itself(key, tensor, torch.ones_like(tensor))
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "depth", "num_tokens"),  # each pair of values
    [
        ("auto", "shallow", None),
        ("auto", "deep", 1),
        ("retained", "shallow", 1),
        ("retained", "deep", None),
        ("recompute", "shallow", None),
        ("recompute", "deep", 1),
    ],
)
def test_joined_sessions_tune_their_own_prompts(
    make: MakeEngine, backbone: Path, mode: str, depth: str, num_tokens: int | None
) -> None:
    case = Case(backbone, depth, num_tokens)
    engine = make(backward=mode, max_wait_s=0.05)
    own = {who: [smashed(2, 10 * n + step) for step in range(3)] for n, who in enumerate(PEOPLE)}

    async def train_all() -> list[tuple[list[Tensor], Tensor]]:
        return await asyncio.gather(
            *(case.train(engine, batches, who=who) for who, batches in own.items())
        )

    for (features, prompts), batches in zip(asyncio.run(train_all()), own.values(), strict=True):
        expected, tuned = case.by_hand(batches)
        for one, other in zip(features, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prompts, tuned, rtol=1e-5, atol=1e-6)
    tasks = 2 * 3 * len(PEOPLE)
    assert asyncio.run(mean_batch(engine, tasks)) > 2, "most of their batches were joined"


@pytest.mark.parametrize("missing", [1, 4])
def test_a_step_does_not_wait_long_for_others_gradients(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """Few or most of a batch's gradients are missing; late gradients give correct results, too."""
    engine = make()
    inputs = [with_prompts(seed=number) for number in range(len(PEOPLE))]
    gradient = with_prompts(seed=50)
    early, late = range(missing, len(PEOPLE)), range(missing)

    async def steps() -> list[Tensor]:
        jobs = [engine.submit(forward(key, x, w)) for x, w in zip(inputs, PEOPLE, strict=True)]
        await together(engine, key, monkeypatch, jobs)
        began = time.monotonic()
        found = dict.fromkeys(PEOPLE, torch.empty(0))
        for group in (early, late):
            answers = await asyncio.gather(
                *(engine.submit(backward(key, gradient, PEOPLE[place])) for place in group)
            )
            found |= {PEOPLE[place]: a for place, a in zip(group, answers, strict=True)}
        assert time.monotonic() - began < 10
        return list(found.values())

    for tensor, result in zip(inputs, asyncio.run(steps()), strict=True):
        torch.testing.assert_close(
            result, by_itself(key, tensor, gradient)[1], rtol=1e-5, atol=1e-5
        )
    asyncio.run(mean_batch(engine, 2 * len(PEOPLE)))
    assert engine.figures("r1").recomputed > 0
    assert engine._tracker.memory.taken == 0


def test_a_batch_does_not_wait_for_a_released_participant(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(max_wait_s=30.0)

    async def steps() -> None:
        jobs = [engine.submit(forward(key, with_prompts(), who)) for who in PEOPLE[:2]]
        with busy_worker(engine, key, monkeypatch):
            waiting = [asyncio.ensure_future(job) for job in jobs]
            await asyncio.sleep(0.05)
            jobs.clear()
        engine._schedule._max_wait_s = 0.0  # the forwards themselves need not wait
        with engine._lock:
            engine._lock.notify()
        await asyncio.gather(*waiting)
        graph = next(iter(engine._tracker.memory.steps._graph_users))
        assert len(graph.rows) == 2
        first = asyncio.ensure_future(engine.submit(backward(key, with_prompts(), PEOPLE[0])))
        await asyncio.sleep(0.01)
        engine.release("r1", PEOPLE[1])
        await asyncio.wait_for(first, 10)

    asyncio.run(steps())
    assert engine._tracker.memory.taken == 0


def test_a_lone_participant_does_not_wait(make: MakeEngine, key: BodyKey) -> None:
    engine = make(max_wait_s=20.0)

    async def steps() -> float:
        began = time.monotonic()
        for _ in range(3):
            await engine.submit(forward(key, with_prompts(), "p1"))
            await engine.submit(backward(key, with_prompts(), "p1"))
            engine.release("r1")
        return time.monotonic() - began

    assert asyncio.run(steps()) < 15


def test_a_failure_within_a_batch_affects_that_job_alone(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    real = compute.run_forward
    bad = with_prompts()
    bad[1, 0, 0] = 42.0

    def broken(body: Any, tensor: Tensor, *more: Any) -> Any:
        if bool((tensor == 42.0).any()):
            raise ZeroDivisionError
        return real(body, tensor, *more)

    monkeypatch.setattr(compute, "run_forward", broken)
    inputs = [with_prompts(seed=1), bad, with_prompts(seed=2)]
    jobs = [engine.submit(forward(key, x, w)) for x, w in zip(inputs, PEOPLE[:3], strict=True)]
    first, failed, last = asyncio.run(together(engine, key, monkeypatch, jobs))
    assert isinstance(failed, InternalError)
    for tensor, found in ((inputs[0], first), (inputs[2], last)):
        torch.testing.assert_close(found, by_itself(key, tensor, tensor)[0], rtol=1e-5, atol=1e-5)


def test_a_failed_joint_backward_runs_again_for_each_task(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    real = compute.run_backward
    gradients = [with_prompts(seed=seed) for seed in (1, 2, 3)]

    def full(graph: Any, gradient: Tensor) -> Tensor:
        if len(gradient) > 2:
            raise torch.OutOfMemoryError("full")
        return real(graph, gradient)

    async def steps() -> list[Any]:
        jobs = [engine.submit(forward(key, with_prompts(), who)) for who in PEOPLE[:3]]
        await together(engine, key, monkeypatch, jobs)
        monkeypatch.setattr(compute, "run_backward", full)
        backwards = zip(gradients, PEOPLE, strict=False)
        return await asyncio.gather(*(engine.submit(backward(key, g, w)) for g, w in backwards))

    for gradient, found in zip(gradients, asyncio.run(steps()), strict=True):
        expected = by_itself(key, with_prompts(), gradient)[1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_memory_for_graphs_the_forward_is_recomputed(
    make: MakeEngine, key: BodyKey
) -> None:
    probe = make()
    asyncio.run(probe.submit(forward(key, with_prompts(), "p1")))
    one_step = probe._tracker.memory.taken
    engine = make(retained=int(1.5 * one_step))

    async def fill_memory() -> None:
        await engine.submit(forward(key, with_prompts(), "p9"))  # its size is known from now on
        await engine.submit(backward(key, with_prompts(), "p9"))
        for who in PEOPLE:
            await engine.submit(forward(key, with_prompts(), who))
            assert engine._tracker.memory.taken <= 1.5 * one_step
        for who in PEOPLE:
            found = await engine.submit(backward(key, with_prompts(seed=7), who))
            expected = by_itself(key, with_prompts(), with_prompts(seed=7))[1]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    asyncio.run(fill_memory())
    asyncio.run(mean_batch(engine, 2 * len(PEOPLE) + 2))
    assert engine.figures("r1").recomputed == 2 * (len(PEOPLE) - 1)
    assert engine._tracker.memory.taken == 0


def test_counters_belong_to_a_run_and_are_dropped_with_it(
    make: MakeEngine, backbone: Path, key: BodyKey
) -> None:
    case, engine = Case(backbone, "deep"), make()
    asyncio.run(case.train(engine, BATCHES))
    asyncio.run(mean_batch(engine, 2 * len(BATCHES)))
    figures = engine.figures("r1")
    assert figures.tasks == 2 * len(BATCHES)
    assert figures.samples == 2 * sizes(BATCHES)
    assert 0 < figures.compute_s < 60
    assert engine.figures("r2").tasks == 0
    engine.forget("r1")
    assert engine.figures("r1").tasks == 0
    assert engine._tracker.memory.taken == 0, "sessions go with their run"


def test_a_gradient_of_another_shape_does_not_affect_others(
    make: MakeEngine, backbone: Path
) -> None:
    case, engine = Case(backbone, "deep", 1), make()

    async def steps() -> None:
        features = await engine.submit(case.job(0, 1, BATCHES[0]))
        with pytest.raises(Exception, match="another shape"):
            await engine.submit(case.job(1, 1, None, gradient_of(features)[:1]))
        await engine.submit(case.job(1, 1, None, gradient_of(features)))

    asyncio.run(steps())


def test_after_a_failed_backward_the_forward_is_sent_again(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = make(), compute.run_backward

    def full(*job: Any) -> Tensor:
        real(*job)
        raise torch.OutOfMemoryError("full")

    async def steps() -> Tensor:
        await engine.submit(forward(key, with_prompts(), "p1"))
        with monkeypatch.context() as patch:
            patch.setattr(compute, "run_backward", full)
            with pytest.raises(Busy):
                await engine.submit(backward(key, with_prompts(seed=1), "p1"))
        assert engine._tracker.memory.taken == 0
        with pytest.raises(StepLost):
            await engine.submit(backward(key, with_prompts(seed=1), "p1"))
        await engine.submit(forward(key, with_prompts(), "p1"))
        return await engine.submit(backward(key, with_prompts(seed=1), "p1"))

    expected = by_itself(key, with_prompts(), with_prompts(seed=1))[1]
    torch.testing.assert_close(asyncio.run(steps()), expected, rtol=1e-5, atol=1e-5)


def test_a_graph_larger_than_the_memory_is_not_retained_and_its_step_works(
    make: MakeEngine, key: BodyKey
) -> None:
    engine = make(retained=100_000)

    async def steps() -> None:
        for name in ("p1", "p2", "p3"):
            await engine.submit(forward(key, with_prompts(), name))
            await engine.submit(backward(key, with_prompts(seed=1), name))
        with pytest.raises(TooLarge):
            await engine.submit(forward(key, with_prompts(batch=200), "p4"))

    asyncio.run(steps())
    assert engine._tracker.memory.taken == 0


@pytest.mark.parametrize("mode", MODES)
def test_sessions_that_fill_the_memory_still_finish(
    make: MakeEngine, backbone: Path, mode: str
) -> None:
    """An open session needs no more memory than it frees."""
    case, probe = Case(backbone, "deep"), make(backward=mode)
    asyncio.run(probe.submit(case.job(0, 1, smashed(4))))
    engine = make(retained=probe._tracker.memory.taken, backward=mode)
    batches = [smashed(4, seed) for seed in range(4)]

    async def sessions() -> None:
        await engine.submit(case.job(0, 4, batches[0], who="abandoned"))
        engine._tracker.memory.session_bytes[PromptSessions] *= 3  # more sessions than fit
        engine.release("r1", "abandoned")
        await case.train(engine, batches, who="p1")

    asyncio.run(sessions())
