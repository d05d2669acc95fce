"""Exchanges that fail, whose round ends, or that have little memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import Busy, InternalError, NonFinite, StepLost, TooLarge, WrongShape
from split_server.engine import compute
from split_server.engine.engine import Engine
from tests.support.engine import (
    BATCHES,
    PROMPTS,
    TOKENS,
    WIDTH,
    Case,
    MakeEngine,
    gradient_of,
    is_empty,
    smashed,
    tuned_prompts,
)
from tests.support.federation import FakeClock

# Failures


@pytest.mark.parametrize(
    ("trouble", "answer"),
    [(ZeroDivisionError(), InternalError), (torch.OutOfMemoryError("full"), Busy)],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_failed_forward_can_be_repeated(
    make: MakeEngine,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Exception,
    answer: type[Exception],
    number: int,
) -> None:
    """The request's gradients have been applied and are not applied again."""
    undisturbed, tuned = asyncio.run(case.train(make(), BATCHES))
    engine, real, failures = make(), compute.run_forward, [trouble, trouble]

    def failing(body: Any, tensor: Tensor, *more: Any) -> Any:
        if failures and torch.equal(tensor, BATCHES[number]):
            raise failures.pop()
        return real(body, tensor, *more)

    monkeypatch.setattr(compute, "run_forward", failing)

    async def train_with_failures() -> None:
        gradients: Tensor | None = None
        for place, batch in enumerate([*BATCHES, None]):
            job = case.job(place, 4, batch, gradients)
            for _ in range(2 if place == number else 0):
                with pytest.raises(answer):
                    await engine.submit(job)
            features = await engine.submit(job)
            if batch is not None:
                assert torch.equal(features, undisturbed[place])
                gradients = gradient_of(features)

    asyncio.run(train_with_failures())
    assert not failures
    assert torch.equal(tuned_prompts(engine), tuned)
    assert is_empty(engine)


def test_wrong_tensors_are_refused_and_change_nothing(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def refusals() -> None:
        features = await engine.submit(case.job(0, 1, BATCHES[0]))
        good = gradient_of(features)
        with pytest.raises(WrongShape):
            await engine.submit(case.job(1, 1, None, good[:2]))
        assert engine._find_session("r1", "p1", "s").applied == 0
        await engine.submit(case.job(1, 1, None, good))

    asyncio.run(refusals())
    assert torch.equal(
        tuned_prompts(engine),
        asyncio.run(case.train(make(), BATCHES[:1]))[1],
    )


def test_prompts_outside_the_range_of_float32_never_become_an_update(
    make: MakeEngine, case: Case
) -> None:
    engine = make()

    async def overflow() -> None:
        features = await engine.submit(case.job(0, 1, BATCHES[0]))
        huge = torch.full_like(features, 3e38)
        await engine.submit(case.job(1, 1, None, huge))
        with pytest.raises(NonFinite):
            tuned_prompts(engine)
        assert is_empty(engine)
        await case.train(engine, BATCHES[:1], session="t")

    asyncio.run(overflow())


def test_after_a_failed_backward_the_device_must_restart(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = make(), compute.run_backward
    tuned = asyncio.run(case.train(make(), BATCHES))[1]

    async def fail_once() -> Tensor:
        features = await engine.submit(case.job(0, 4, BATCHES[0]))

        def full(*arguments: Any) -> Tensor:
            real(*arguments)
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(compute, "run_backward", full)
        job = case.job(1, 4, BATCHES[1], gradient_of(features))
        with pytest.raises(Busy):
            await engine.submit(job)
        monkeypatch.setattr(compute, "run_backward", real)
        with pytest.raises(StepLost):
            await engine.submit(job)
        return (await case.train(engine, BATCHES))[1]

    assert torch.equal(asyncio.run(fail_once()), tuned)


def test_a_batch_with_late_gradients_is_lost(make: MakeEngine, case: Case) -> None:
    time = FakeClock()
    engine = make(time=time)

    async def too_late() -> None:
        features = await engine.submit(case.job(0, 2, BATCHES[0]))
        time.now += 301
        engine.sweep()
        assert engine._tracker.memory.steps.nbytes == 0
        with pytest.raises(StepLost):
            await engine.submit(case.job(1, 2, BATCHES[1], gradient_of(features)))
        await case.train(engine, BATCHES, session="second")

    asyncio.run(too_late())


def test_an_abandoned_session_expires(make: MakeEngine, case: Case) -> None:
    """For example one whose first batch was decoded while its run ended."""
    time = FakeClock()
    engine = make(time=time)
    engine.forget("r1")
    asyncio.run(engine.submit(case.job(0, 2, BATCHES[0])))
    time.now += 299
    engine.sweep()
    assert len(engine._tracker.memory.steps) == 1
    time.now += 2
    engine.sweep()
    assert engine._tracker.memory.taken == 0
    with pytest.raises(StepLost):
        asyncio.run(engine.submit(case.job(1, 2, BATCHES[1], BATCHES[0])))


def test_an_active_or_finished_session_does_not_expire(make: MakeEngine, case: Case) -> None:
    time = FakeClock()
    engine = make(time=time)

    async def slow() -> None:
        gradients: Tensor | None = None
        for number, batch in enumerate([*BATCHES, None]):
            features = await engine.submit(case.job(number, len(BATCHES), batch, gradients))
            time.now += 299
            engine.sweep()
            gradients = None if batch is None else gradient_of(features)
        time.now += 3600
        engine.sweep()

    asyncio.run(slow())
    undisturbed = asyncio.run(case.train(make(), BATCHES))[1]
    assert torch.equal(tuned_prompts(engine), undisturbed)


# Release


@pytest.mark.parametrize("release", [("r1",), ("r1", "p1")])
def test_a_release_frees_session_and_steps(
    make: MakeEngine, case: Case, release: tuple[str, ...]
) -> None:
    engine = make()

    async def released() -> None:
        features = await engine.submit(case.job(0, 2, BATCHES[0]))
        await case.train(engine, BATCHES, who="p2")
        engine.release("r2")
        engine.release("r1", "p3")
        assert len(engine._tracker.memory.steps) == 1
        engine.release(*release)
        assert is_empty(engine)
        with pytest.raises(StepLost):
            await engine.submit(case.job(1, 2, BATCHES[1], gradient_of(features)))
        if len(release) == 1:
            with pytest.raises(StepLost):
                tuned_prompts(engine, "p2")
        else:
            tuned_prompts(engine, "p2")

    asyncio.run(released())


@pytest.mark.parametrize("number", [0, 1])
def test_an_exchange_whose_round_ends_meanwhile_leaves_nothing(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    engine, real = make(), compute.run_forward

    def release_during_forward(body: Any, tensor: Tensor, *more: Any) -> Any:
        if torch.equal(tensor, BATCHES[number]):
            engine.release("r1")
        return real(body, tensor, *more)

    monkeypatch.setattr(compute, "run_forward", release_during_forward)

    async def exchanges() -> None:
        gradients: Tensor | None = None
        for place in range(number + 1):
            features = await engine.submit(case.job(place, 3, BATCHES[place], gradients))
            gradients = gradient_of(features)
        with pytest.raises(StepLost):
            await engine.submit(case.job(number + 1, 3, BATCHES[2], gradients))

    asyncio.run(exchanges())
    assert is_empty(engine)


# Memory


def memory_of_a_step(engine: Engine, case: Case, batch: Tensor) -> int:
    asyncio.run(engine.submit(case.job(0, 1, batch)))
    return engine._tracker.memory.taken


def test_one_steps_memory_is_enough_for_a_session(make: MakeEngine, case: Case) -> None:
    """In any order of larger and smaller batches, and after a restart."""
    one_step = memory_of_a_step(make(), case, smashed(4))
    assert one_step > 11 * 4 * (TOKENS + PROMPTS) * WIDTH * 4 * 2, "blocks save their inputs"
    engine = make(retained=one_step, backward="retained")
    batches = [smashed(size, seed) for seed, size in enumerate((4, 4, 1, 4, 3, 4))]

    async def sessions() -> None:
        await case.train(engine, batches, session="first")
        await engine.submit(case.job(0, 6, batches[0], session="abandoned"))
        assert engine._tracker.memory.taken == one_step
        await case.train(engine, batches, session="restarted")
        assert is_empty(engine)
        with pytest.raises(TooLarge):
            await engine.submit(case.job(0, 1, smashed(5)))

    asyncio.run(sessions())


def test_others_wait_while_the_memory_is_full(make: MakeEngine, case: Case) -> None:
    engine = make(retained=memory_of_a_step(make(), case, smashed(4)), backward="retained")

    async def two_devices() -> None:
        await engine.submit(case.job(0, 1, smashed(4), who="p1"))
        with pytest.raises(Busy) as caught:
            await engine.submit(case.job(0, 1, smashed(4), who="p2"))
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 0
        features = await engine.submit(case.job(0, 1, smashed(4), who="p1"))  # a repeat
        await engine.submit(case.job(1, 1, None, gradient_of(features), who="p1"))
        await case.train(engine, [smashed(4)], who="p2")

    asyncio.run(two_devices())


def test_no_other_job_takes_the_memory_between_two_batches(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = make()
    limit = memory_of_a_step(probe, case, smashed(4))
    others = sum(
        probe._tracker.memory.session_bytes.values()
    )  # p1's session stays until its round ends
    engine, real = make(retained=limit + others, backward="retained"), compute.run_forward
    batches = [smashed(4, seed) for seed in range(3)]
    responses: list[Any] = []

    async def two_devices() -> None:
        loop = asyncio.get_running_loop()

        def watched(body: Any, tensor: Tensor, *more: Any) -> Any:
            assert engine._tracker.memory.steps.nbytes <= limit
            if not responses and torch.equal(tensor, batches[1]):
                other = engine.submit(case.job(0, 1, smashed(4), who="p2"))
                responses.append(asyncio.run_coroutine_threadsafe(other, loop))
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(20)
            return real(body, tensor, *more)

        monkeypatch.setattr(compute, "run_forward", watched)
        await case.train(engine, batches, who="p1")
        with pytest.raises(Busy):
            await asyncio.wrap_future(responses[0])
        await case.train(engine, batches, who="p2")

    asyncio.run(two_devices())
