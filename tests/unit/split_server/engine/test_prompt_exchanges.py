"""Exchanges tune the same prompts as a plain loop over the uncut model's blocks."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import IdempotencyKeyReused, InvalidField, StepLost
from split_server.engine import compute
from split_server.engine.api import InferJob
from split_server.engine.prompt_sessions import PromptSession
from tests.support.engine import (
    BATCHES,
    DEPTHS,
    PREFIX,
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

# Results


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("num_tokens", [None, 1, 3])
def test_features_and_prompts_equal_the_uncut_models(
    make: MakeEngine, backbone: Path, depth: str, num_tokens: int | None
) -> None:
    case = Case(backbone, depth, num_tokens)
    features, prompts = asyncio.run(case.train(make(), BATCHES))
    expected, tuned = case.by_hand(BATCHES)
    for one, other in zip(features, expected, strict=True):
        assert one.shape[1] == (TOKENS + PROMPTS if num_tokens is None else num_tokens)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prompts, tuned, rtol=1e-5, atol=1e-6)
    moved = (tuned - case.initial).abs().amax(dim=(1, 2))
    assert len(moved) == (11 if depth == "deep" else 1)
    assert moved.min() > 1e-4, "the comparison is not of prompts that stand still"


@pytest.mark.parametrize("num_tokens", [None, 1])
def test_inference_with_the_prompts_gives_the_same_features(
    make: MakeEngine, case: Case, num_tokens: int | None
) -> None:
    case.num_tokens = num_tokens
    job = InferJob("r1", "p1", case.key, BATCHES[0], case.initial, num_tokens)
    features = asyncio.run(make().infer(job))
    torch.testing.assert_close(features, case.by_hand(BATCHES[:1])[0][0], rtol=1e-5, atol=1e-5)
    assert not features.requires_grad


def test_mean_token_initialisation_shifts_the_prompts(make: MakeEngine, case: Case) -> None:
    job = case.job(0, 1, BATCHES[0])
    engine = make()
    asyncio.run(engine.submit(replace(job, plan=replace(job.plan, from_mean_token=True))))
    mean = BATCHES[0][:, PREFIX:].reshape(-1, WIDTH).double().mean(dim=0)
    shifted = case.initial.clone()
    shifted[0] += mean.float()
    prompts = engine._find_session("r1", "p1", "s").trained_state()["prompts"]
    torch.testing.assert_close(prompts, shifted, rtol=0, atol=1e-6)


def test_participants_do_not_affect_each_other(make: MakeEngine, case: Case) -> None:
    engine = make()
    others = [smashed(3, seed) for seed in (11, 12)]

    async def both() -> list[tuple[list[Tensor], Tensor]]:
        return await asyncio.gather(
            case.train(engine, BATCHES, who="p1"), case.train(engine, others, who="p2")
        )

    for (features, prompts), batches in zip(asyncio.run(both()), (BATCHES, others), strict=True):
        expected, tuned = asyncio.run(case.train(make(), batches))
        for one, other in zip(features, expected, strict=True):  # joined or not
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prompts, tuned, rtol=1e-5, atol=1e-6)


# Repeated and misordered requests


def test_a_repeat_gets_the_same_response_and_tunes_nothing_twice(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    undisturbed, tuned = asyncio.run(case.train(make(), BATCHES))
    ran = {"forward": 0, "backward": 0}
    forward, backward = compute.run_forward, compute.run_backward

    def counted_forward(*arguments: Any) -> Any:
        ran["forward"] += 1
        return forward(*arguments)

    def counted_backward(*arguments: Any) -> Any:
        ran["backward"] += 1
        return backward(*arguments)

    monkeypatch.setattr(compute, "run_forward", counted_forward)
    monkeypatch.setattr(compute, "run_backward", counted_backward)

    async def repeat_each_request() -> None:
        gradients: Tensor | None = None
        for number, batch in enumerate([*BATCHES, None]):
            job = case.job(number, 4, batch, gradients)
            responses = await asyncio.gather(*(engine.submit(job) for _ in range(3)))
            responses.append(await engine.submit(job))
            assert all(torch.equal(responses[0], one) for one in responses)
            if batch is not None:
                assert torch.equal(responses[0], undisturbed[number])
                gradients = gradient_of(responses[0])
        assert torch.equal(tuned_prompts(engine), tuned)

    asyncio.run(repeat_each_request())
    assert ran == {"forward": 4, "backward": 4}


def test_a_number_takes_one_request_only(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def reuse() -> None:
        first = await engine.submit(case.job(0, 4, BATCHES[0]))
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(case.job(0, 4, BATCHES[1]))
        await engine.submit(case.job(1, 4, BATCHES[1], gradient_of(first)))
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(case.job(1, 4, BATCHES[1], gradient_of(first) * 2))

    asyncio.run(reuse())
    assert engine._find_session("r1", "p1", "s").applied == 1


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_a_misordered_request_is_lost(make: MakeEngine, case: Case, number: int) -> None:
    """After the response to request 2, only its repeat and request 3 are in order."""
    engine = make()

    async def out_of_order() -> None:
        gradients: Tensor | None = None
        for place in range(3):
            features = await engine.submit(case.job(place, 5, BATCHES[place], gradients))
            gradients = gradient_of(features)
        before = engine._find_session("r1", "p1", "s").trained_state()["prompts"]
        job = case.job(number, 5, BATCHES[3], gradients)
        if number == 0:  # a late repeat of the first request
            job = replace(job, gradients=None)
        if number == 3:
            await engine.submit(job)
            assert engine._find_session("r1", "p1", "s").applied == 3
        else:
            with pytest.raises(StepLost):
                await engine.submit(job)
            assert torch.equal(
                engine._find_session("r1", "p1", "s").trained_state()["prompts"], before
            )
            await engine.submit(case.job(3, 5, BATCHES[3], gradients))  # the session continues

    asyncio.run(out_of_order())


def test_an_unknown_session_is_lost(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def lost() -> None:
        features = await engine.submit(case.job(0, 2, BATCHES[0]))
        gradients = gradient_of(features)
        for of in ({"who": "p2"}, {"session": "t"}):
            with pytest.raises(StepLost):
                await engine.submit(case.job(1, 2, BATCHES[1], gradients, **of))
            with pytest.raises(StepLost):
                await engine.submit(case.job(2, 2, None, gradients, **of))
        assert len(engine._tracker.memory.steps) == 1

    asyncio.run(lost())


def test_a_session_has_one_number_of_steps(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def wrong() -> None:
        features = await engine.submit(case.job(0, 3, BATCHES[0]))
        gradients = gradient_of(features)
        for job in (case.job(1, 2, BATCHES[1], gradients), case.job(1, 1, None, gradients)):
            with pytest.raises(InvalidField) as caught:
                await engine.submit(job)
            named = (caught.value.field, caught.value.limit, caught.value.value)
            assert named == ("steps", 3, job.steps)
        features = await engine.submit(case.job(1, 3, BATCHES[1], gradients))
        with pytest.raises(InvalidField):  # a session cannot end early
            await engine.submit(case.job(2, 2, None, gradient_of(features)))
        features = await engine.submit(case.job(2, 3, BATCHES[2], gradient_of(features)))
        await engine.submit(case.job(3, 3, None, gradient_of(features)))

    asyncio.run(wrong())
    prompts = tuned_prompts(engine)
    torch.testing.assert_close(prompts, case.by_hand(BATCHES[:3])[1], rtol=1e-5, atol=1e-6)


def test_the_trained_state_is_that_of_a_finished_session(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def unfinished() -> None:
        with pytest.raises(StepLost):
            tuned_prompts(engine)
        features = await engine.submit(case.job(0, 2, BATCHES[0]))
        with pytest.raises(StepLost):
            tuned_prompts(engine)
        features = await engine.submit(case.job(1, 2, BATCHES[1], gradient_of(features)))
        with pytest.raises(StepLost):
            tuned_prompts(engine)
        await engine.submit(case.job(2, 2, None, gradient_of(features)))
        for who, name in (("p2", "s"), ("p1", "t")):
            with pytest.raises(StepLost):
                tuned_prompts(engine, who, name)

    asyncio.run(unfinished())
    assert torch.equal(tuned_prompts(engine), tuned_prompts(engine))
    assert is_empty(engine)


def test_a_new_session_replaces_the_earlier_one(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def twice() -> tuple[Any, Any]:
        features = await engine.submit(case.job(0, 4, smashed(3, 77), session="old"))
        await engine.submit(case.job(1, 4, smashed(3, 78), gradient_of(features), session="old"))
        restarted = await case.train(engine, BATCHES, session="new")
        with pytest.raises(StepLost):
            await engine.submit(case.job(2, 4, BATCHES[0], gradient_of(features), session="old"))
        return restarted

    features, prompts = asyncio.run(twice())
    undisturbed, tuned = asyncio.run(case.train(make(), BATCHES))
    assert all(torch.equal(one, other) for one, other in zip(features, undisturbed, strict=True))
    assert torch.equal(prompts, tuned)
    assert len(engine._tracker.memory.steps) == 0


def test_jobs_run_while_prompts_are_copied(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy waits for everything in the GPU's queue."""
    engine, real = make(), PromptSession.trained_prompts
    asyncio.run(case.train(engine, BATCHES))
    copying, may_finish = threading.Event(), threading.Event()

    def slow(session: PromptSession) -> Tensor:
        copying.set()
        assert may_finish.wait(20)
        return real(session)

    async def meanwhile() -> Tensor:
        prompts = asyncio.ensure_future(asyncio.to_thread(tuned_prompts, engine))
        assert await asyncio.to_thread(copying.wait, 20)
        late = threading.Timer(10, may_finish.set)  # ends the test if a job waits
        late.start()
        await engine.infer(InferJob("r1", "p2", case.key, BATCHES[0], case.initial))
        assert not may_finish.is_set()
        late.cancel()
        may_finish.set()
        return await prompts

    with monkeypatch.context() as patch:
        patch.setattr(PromptSession, "trained_prompts", slow)
        prompts = asyncio.run(meanwhile())
    assert torch.equal(prompts, tuned_prompts(engine))
