"""Forwards without a backward: nothing before the body is tuned."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import IdempotencyKeyReused, StepLost
from split_model.backbone.weights import open_backbone
from split_model.parts.build import build_body
from split_server.engine import compute
from split_server.engine.api import BackwardJob, ForwardJob, StepKey
from split_server.models.body_key import BodyKey
from tests.support.engine import MakeEngine
from tests.support.federation import smashed


def lone(key: BodyKey, tensor: Tensor, name: str = "s", who: str = "p1") -> ForwardJob:
    fingerprint = int(tensor.sum() * 1000)
    return ForwardJob(StepKey("r1", who, name), key, tensor, fingerprint, backward=False)


def test_the_features_are_the_bodys_and_nothing_is_retained(make: MakeEngine, key: BodyKey) -> None:
    engine = make(retained=1)  # not enough for an input
    body = build_body(key.settings, open_backbone(key.backbone))

    async def steps() -> None:
        for who in ("p1", "p2"):
            for seed in range(6):
                features = await engine.submit(lone(key, smashed(seed=seed), f"s{seed}", who))
                assert torch.equal(features, body(smashed(seed=seed)))
                assert not features.requires_grad
        assert engine._tracker.memory.taken == len(engine._tracker.memory.steps) == 0
        assert 0 < engine._tracker.response_bytes <= 2 * 4 * smashed().nbytes
        with pytest.raises(StepLost):
            await engine.submit(BackwardJob(StepKey("r1", "p1", "s5"), key, smashed(), 2))

    asyncio.run(steps())


def test_a_lone_forward_is_counted(make: MakeEngine, key: BodyKey) -> None:
    engine = make()

    async def steps() -> None:
        await engine.submit(lone(key, smashed()))
        async with asyncio.timeout(20):
            while not engine.figures("r1").tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    asyncio.run(steps())
    assert engine.figures("r1").samples == len(smashed())
    counted = engine._figures.registry.get_sample_value(
        "sfprompt_engine_samples_total", {"run": "r1", "work": "forward"}
    )
    assert counted == len(smashed())


def test_a_repeat_gets_the_same_response_without_computation(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls, real = make(), 0, compute.run_inference

    def counted(*job: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*job)

    monkeypatch.setattr(compute, "run_inference", counted)

    async def repeats() -> None:
        both = await asyncio.gather(*(engine.submit(lone(key, smashed())) for _ in range(3)))
        again = await engine.submit(lone(key, smashed()))
        assert all(torch.equal(again, one) for one in both)
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(lone(key, smashed(seed=5)))

    asyncio.run(repeats())
    assert calls == 1


def test_the_response_is_dropped_with_its_round(
    make: MakeEngine, key: BodyKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = make(), compute.run_inference
    asyncio.run(engine.submit(lone(key, smashed())))
    engine.release("r1", "p1")
    assert engine._tracker.response_bytes == 0

    def overtaken(*job: Any) -> Tensor:
        engine.release("r1")
        return real(*job)

    monkeypatch.setattr(compute, "run_inference", overtaken)
    asyncio.run(engine.submit(lone(key, smashed())))
    assert engine._tracker.response_bytes == 0
