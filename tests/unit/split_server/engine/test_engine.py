"""The engine computes what the body alone computes, within fixed memory."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import (
    Busy,
    IdempotencyKeyReused,
    InternalError,
    StepLost,
    WrongShape,
)
from split_model.backbone.weights import open_backbone
from split_model.parts.body import Body
from split_model.parts.build import build_body
from split_server.engine import compute
from split_server.engine import engine as engine_module
from split_server.engine.api import BackwardJob, ForwardJob, InferJob, StepKey
from split_server.engine.body_cache import BodyCache
from split_server.engine.engine import Engine
from split_server.engine.limits import EngineLimits
from split_server.models.body_key import BodyKey
from tests.support.engine import MIB, PLACEMENT, MakeEngine
from tests.support.federation import SPLIT, TOKENS, WIDTH, FakeClock, run_settings, smashed


@pytest.fixture(scope="module")
def bodies(backbone: Path) -> BodyCache:
    return BodyCache(PLACEMENT)


@pytest.fixture(scope="module")
def body(backbone: Path) -> Body:
    return build_body(SPLIT, open_backbone(backbone))


@pytest.fixture
def make(bodies: BodyCache) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make_engine(
        retained: int = 256 * MIB,
        queued: int = 64 * MIB,
        answers: int = 64 * MIB,
        time: FakeClock | None = None,
        steps: int = 4,
        **more: Any,
    ) -> Engine:
        limits = EngineLimits(retained, queued, answers, 300.0, steps, **more)
        engines.append(Engine(bodies, PLACEMENT, limits, (time or FakeClock()).clock()))
        return engines[-1]

    yield make_engine
    for engine in engines:
        engine.close()


def step(name: str, participant: str = "p1", run: str = "r1") -> StepKey:
    return StepKey(run, participant, name)


def forward(key: BodyKey, tensor: Tensor, name: str = "s", who: str = "p1") -> ForwardJob:
    return ForwardJob(step(name, who), key, tensor, fingerprint=int(tensor.sum() * 1000))


def backward(key: BodyKey, tensor: Tensor, name: str = "s", who: str = "p1") -> BackwardJob:
    return BackwardJob(step(name, who), key, tensor, fingerprint=int(tensor.sum() * 1000))


def test_a_step_equals_the_bodys_forward_and_backward(
    make: MakeEngine, key: BodyKey, body: Body
) -> None:
    engine = make()
    leaf = smashed().requires_grad_(True)
    expected = body(leaf)
    gradients = smashed(seed=1)
    expected.backward(gradients)

    async def whole_step() -> tuple[Tensor, Tensor, Tensor]:
        features = await engine.submit(forward(key, smashed()))
        result = await engine.submit(backward(key, gradients))
        return features, result, await engine.infer(InferJob("r1", "p1", key, smashed()))

    features, result, inferred = asyncio.run(whole_step())
    assert torch.equal(features, expected)
    assert torch.equal(result, leaf.grad)  # type: ignore[arg-type]
    assert torch.equal(inferred, expected)
    assert not inferred.requires_grad


def test_a_responses_memory_is_freed_as_soon_as_it_is_taken(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the next garbage collection: the memory in use must follow from the settings alone."""
    monkeypatch.setitem(engine_module._FULL_BATCH_TOKENS, "cpu", smashed().shape[1])
    engine = make(answers=0)
    taken: list[weakref.ref[Tensor]] = []

    async def take_all() -> None:
        taken.append(weakref.ref(await engine.submit(forward(key, smashed()))))
        taken.append(weakref.ref(await engine.submit(backward(key, smashed(seed=1)))))
        joined = InferJob("r1", "p1", key, smashed().repeat(2, 1, 1))
        taken.append(weakref.ref(await engine.infer(joined)))

    gc.disable()
    try:
        asyncio.run(take_all())
        engine.close()  # the worker drops its last batch
        assert [tensor() is None for tensor in taken] == [True, True, True]
    finally:
        gc.enable()


def test_a_large_inference_runs_in_full_batches(
    make: MakeEngine, key: BodyKey, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request must neither block the body nor use unlimited memory."""
    monkeypatch.setitem(engine_module._FULL_BATCH_TOKENS, "cpu", 3 * smashed().shape[1])
    rows, sizes = smashed().repeat(4, 1, 1), []
    real = compute.run_inference

    def counted(body: Body, batch: Tensor, *more: object) -> Tensor:
        sizes.append(len(batch))
        return real(body, batch, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(compute, "run_inference", counted)
    features = asyncio.run(make().infer(InferJob("r1", "p1", key, rows)))
    assert torch.allclose(features, body(rows), atol=1e-5)
    assert sum(sizes) == len(rows)
    assert max(sizes) == 3


def test_a_repeat_gets_the_same_response_without_computation(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    calls = 0
    real = compute.run_forward

    def counted(*job: Any) -> tuple[Tensor, Tensor, int]:
        nonlocal calls
        calls += 1
        return real(*job)

    monkeypatch.setattr(compute, "run_forward", counted)

    async def repeats() -> None:
        both = await asyncio.gather(*(engine.submit(forward(key, smashed())) for _ in range(3)))
        assert all(torch.equal(both[0], one) for one in both)
        first = await engine.submit(backward(key, smashed(seed=1)))
        assert torch.equal(first, await engine.submit(backward(key, smashed(seed=1))))
        assert torch.equal(both[0], await engine.submit(forward(key, smashed())))

    asyncio.run(repeats())
    assert calls == 1


def test_a_step_takes_one_request_only(make: MakeEngine, key: BodyKey) -> None:
    engine = make()

    async def reuse() -> None:
        await engine.submit(forward(key, smashed()))
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(forward(key, smashed(seed=5)))
        await engine.submit(backward(key, smashed(seed=1)))
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(backward(key, smashed(seed=2)))
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(forward(key, smashed(seed=5)))

    asyncio.run(reuse())


def test_participants_may_use_equal_step_names(make: MakeEngine, key: BodyKey) -> None:
    engine = make()

    async def both() -> None:
        one = await engine.submit(forward(key, smashed(), who="p1"))
        other = await engine.submit(forward(key, smashed(seed=9), who="p2"))
        assert not torch.equal(one, other)

    asyncio.run(both())


def test_a_step_that_is_not_retained_is_lost(make: MakeEngine, key: BodyKey) -> None:
    engine = make()

    async def lost() -> None:
        with pytest.raises(StepLost):
            await engine.submit(backward(key, smashed()))
        for name, release in (("a", ("r1", None)), ("b", ("r1", "p1"))):
            await engine.submit(forward(key, smashed(), name))
            engine.release(*release)
            with pytest.raises(StepLost):
                await engine.submit(backward(key, smashed(), name))
        await engine.submit(forward(key, smashed(), "c"))
        engine.release("r1", "p2")
        engine.release("r2")
        await engine.submit(backward(key, smashed(), "c"))

    asyncio.run(lost())


def test_a_step_without_its_backward_is_dropped(make: MakeEngine, key: BodyKey) -> None:
    time = FakeClock()
    engine = make(time=time)

    async def late() -> None:
        first = await engine.submit(forward(key, smashed()))
        time.now += 299
        engine.sweep()
        assert len(engine._tracker.memory.steps) == 1
        time.now += 1
        engine.sweep()
        assert len(engine._tracker.memory.steps) == engine._tracker.memory.steps.nbytes == 0
        with pytest.raises(StepLost):
            await engine.submit(backward(key, smashed()))
        again = await engine.submit(forward(key, smashed()))
        assert torch.equal(first, again)
        await engine.submit(backward(key, smashed()))

    asyncio.run(late())


def test_a_late_steps_graph_is_dropped_and_its_backward_still_works(
    make: MakeEngine, key: BodyKey
) -> None:
    time = FakeClock()
    engine = make(time=time)

    async def late(wait_s: float) -> Tensor:
        await engine.submit(forward(key, smashed(), str(wait_s)))
        whole = engine._tracker.memory.taken
        time.now += wait_s
        engine.sweep()
        assert (engine._tracker.memory.taken < whole / 10) == (wait_s >= 30)
        return await engine.submit(backward(key, smashed(), str(wait_s)))

    assert torch.equal(asyncio.run(late(29)), asyncio.run(late(30)))
    assert engine._tracker.memory.taken == 0


def test_a_new_step_replaces_the_participants_oldest(make: MakeEngine, key: BodyKey) -> None:
    engine = make(steps=2)

    async def many() -> None:
        for name in "abc":
            await engine.submit(forward(key, smashed(), name))
        with pytest.raises(StepLost):
            await engine.submit(backward(key, smashed(), "a"))
        for name in "bc":
            await engine.submit(backward(key, smashed(), name))

    asyncio.run(many())


def test_the_queue_is_bounded_and_one_sender_cannot_fill_it(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_job = 2 * TOKENS * WIDTH * 4
    engine = make(queued=2 * one_job)
    may_finish, at_work = threading.Event(), threading.Event()
    real = compute.run_inference

    def blocked(*job: Any) -> Tensor:
        at_work.set()
        may_finish.wait(20)
        return real(*job)

    monkeypatch.setattr(compute, "run_inference", blocked)

    async def fill_queue() -> None:
        first = asyncio.create_task(engine.infer(InferJob("r1", "p1", key, smashed())))
        await asyncio.to_thread(at_work.wait, 20)
        waiting = [asyncio.create_task(engine.infer(InferJob("r1", "p1", key, smashed())))]
        await asyncio.sleep(0)
        with pytest.raises(Busy):  # one sender leaves as much free as it takes
            await engine.infer(InferJob("r1", "p1", key, smashed()))
        waiting += [asyncio.create_task(engine.infer(InferJob("r1", "p2", key, smashed())))]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await engine.infer(InferJob("r1", "p3", key, smashed()))
        may_finish.set()
        await asyncio.gather(first, *waiting)
        await engine.infer(InferJob("r1", "p1", key, smashed()))

    asyncio.run(fill_queue())


def test_a_failed_job_does_not_affect_others(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    real = compute.run_inference

    def broken(body: Body, tensor: Tensor, *job: Any) -> Tensor:
        if bool((tensor[:, 0, 0] == 42.0).any()):
            raise ZeroDivisionError
        return real(body, tensor, *job)

    monkeypatch.setattr(compute, "run_inference", broken)
    bad = smashed()
    bad[0, 0, 0] = 42.0

    async def mixed() -> None:
        good, failed, after = await asyncio.gather(
            engine.infer(InferJob("r1", "p1", key, smashed())),
            engine.infer(InferJob("r1", "p1", key, bad)),
            engine.infer(InferJob("r1", "p1", key, smashed())),
            return_exceptions=True,
        )
        assert isinstance(failed, InternalError)
        assert isinstance(good, Tensor)
        assert isinstance(after, Tensor)
        assert torch.equal(good, after)

    asyncio.run(mixed())


def test_wrong_tensors_are_refused_and_the_step_is_retained(make: MakeEngine, key: BodyKey) -> None:
    engine = make()

    async def refusals() -> None:
        with pytest.raises(WrongShape):
            await engine.infer(InferJob("r1", "p1", key, torch.zeros(1, TOKENS + 1, WIDTH)))
        with pytest.raises(WrongShape):
            await engine.infer(InferJob("r1", "p1", key, torch.zeros(1, TOKENS, WIDTH + 1)))
        await engine.submit(forward(key, smashed(), "t"))
        with pytest.raises(WrongShape):
            await engine.submit(BackwardJob(step("t"), key, smashed(batch=3), 2))
        await engine.submit(BackwardJob(step("t"), key, smashed(seed=1), 3))

    asyncio.run(refusals())


def test_a_forward_whose_round_has_ended_is_not_retained(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    real = compute.run_forward

    def overtaken(*job: Any) -> tuple[Tensor, Tensor, int]:
        engine.release("r1")
        return real(*job)

    monkeypatch.setattr(compute, "run_forward", overtaken)
    asyncio.run(engine.submit(forward(key, smashed())))
    assert len(engine._tracker.memory.steps) == engine._tracker.memory.steps.nbytes == 0


def test_a_cancelled_request_does_not_cancel_its_repeats(make: MakeEngine, key: BodyKey) -> None:
    engine = make()

    async def gone() -> None:
        first = asyncio.create_task(engine.submit(forward(key, smashed())))
        second = asyncio.create_task(engine.submit(forward(key, smashed())))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).shape == (2, TOKENS, WIDTH)

    asyncio.run(gone())


def test_a_stopped_engine_is_busy(make: MakeEngine, key: BodyKey) -> None:
    engine = make()
    engine.close()
    with pytest.raises(Busy):
        asyncio.run(engine.infer(InferJob("r1", "p1", key, smashed())))


def test_without_memory_for_responses_repeats_are_lost(make: MakeEngine, key: BodyKey) -> None:
    engine = make(answers=0)

    async def once() -> None:
        await engine.submit(forward(key, smashed()))
        await engine.submit(backward(key, smashed(seed=1)))
        assert engine._tracker.response_bytes == 0
        with pytest.raises(StepLost):
            await engine.submit(backward(key, smashed(seed=1)))

    asyncio.run(once())


def test_runs_with_other_prompts_share_the_weights(backbone: Path, key: BodyKey) -> None:
    cache = BodyCache(PLACEMENT, max_weights=1)
    model = run_settings().model
    other = run_settings().model_copy(
        update={"model": model.model_copy(update={"prompt_count": 5, "num_classes": 3})}
    )
    first, second = cache.get(key), cache.get(BodyKey.of(str(backbone), other))
    assert first is not second
    assert first is cache.get(BodyKey.of(str(backbone), run_settings(seed=3)))
    assert {p.data_ptr() for p in first.parameters()} == {p.data_ptr() for p in second.parameters()}


def test_a_body_without_blocks_returns_its_input(make: MakeEngine, backbone: Path) -> None:
    engine = make()
    model = run_settings().model.model_copy(update={"cut": 12})
    empty = BodyKey.of(str(backbone), run_settings().model_copy(update={"model": model}))

    async def through() -> None:
        assert torch.equal(await engine.submit(forward(empty, smashed())), smashed())
        result = await engine.submit(backward(empty, smashed(seed=1)))
        assert torch.equal(result, smashed(seed=1))

    asyncio.run(through())
