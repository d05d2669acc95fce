"""Open steps stay within their memory; a participant's new step may replace its oldest."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from protocol.errors import Busy, StepLost, TooLarge
from split_server.engine.api import BackwardJob, ForwardJob, StepKey
from split_server.models.body_key import BodyKey
from tests.support.engine import MakeEngine
from tests.support.federation import TOKENS, WIDTH, smashed

STEP = 2 * smashed().nbytes  # input and response


def forward(key: BodyKey, name: str, who: str = "p1", samples: int = 2) -> ForwardJob:
    tensor: Tensor = smashed(samples)
    return ForwardJob(StepKey("r1", who, name), key, tensor, fingerprint=1)


def test_a_new_step_replaces_the_participants_oldest_and_no_other(
    make: MakeEngine, key: BodyKey
) -> None:
    engine = make(retained=5 * STEP, backward="recompute")  # four steps for each participant

    async def steps() -> None:
        await engine.submit(forward(key, "s", "p2"))
        for name in "abcdef":
            await engine.submit(forward(key, name))
            assert engine._tracker.memory.taken <= 5 * STEP
        with pytest.raises(Busy):  # p2 has fewer steps than it may have
            await engine.submit(forward(key, "t", "p2"))
        for lost in "ab":
            with pytest.raises(StepLost):
                await engine.submit(BackwardJob(StepKey("r1", "p1", lost), key, smashed(), 2))
        for who, name in (("p1", "c"), ("p1", "f"), ("p2", "s")):
            job = BackwardJob(StepKey("r1", who, name), key, smashed(seed=1), 2)
            assert torch.isfinite(await engine.submit(job)).all()

    asyncio.run(steps())
    assert engine._tracker.memory.taken == 2 * STEP


def test_concurrent_forwards_do_not_share_one_steps_memory(make: MakeEngine, key: BodyKey) -> None:
    """The oldest step is large, the others are small."""
    engine = make(retained=7 * STEP, backward="recompute")

    async def steps() -> None:
        await engine.submit(forward(key, "large", samples=8))
        for name in "abc":
            await engine.submit(forward(key, name))
        answers = await asyncio.gather(
            *(engine.submit(forward(key, name, samples=8)) for name in "defg"),
            return_exceptions=True,
        )
        assert [type(answer) for answer in answers] == [Tensor, Busy, Busy, Busy]
        assert engine._tracker.memory.taken <= 7 * STEP

    asyncio.run(steps())


def test_a_step_too_small_to_help_is_not_replaced(make: MakeEngine, key: BodyKey) -> None:
    engine = make(retained=4 * STEP, backward="recompute")

    async def steps() -> None:
        for name in "abcd":
            await engine.submit(forward(key, name))
        with pytest.raises(Busy):
            await engine.submit(forward(key, "e", samples=4))
        await engine.submit(BackwardJob(StepKey("r1", "p1", "a"), key, smashed(seed=1), 2))

    asyncio.run(steps())


def test_open_steps_stay_within_their_memory(make: MakeEngine, key: BodyKey) -> None:
    probe = make()
    asyncio.run(probe.submit(forward(key, "s")))
    one_step = probe._tracker.memory.steps.nbytes
    assert one_step > 11 * TOKENS * WIDTH * 4 * 2, "eleven blocks save more than their inputs"
    engine = make(retained=int(2.5 * one_step), backward="retained")

    async def many() -> None:
        names = "abcdef"
        answers = await asyncio.gather(
            *(engine.submit(forward(key, "s", who)) for who in names),
            return_exceptions=True,
        )
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert refused
        assert all(isinstance(error, Busy) for error in refused)
        assert all(error.retry_after_s and error.retry_after_s > 0 for error in refused)  # type: ignore[attr-defined]
        assert engine._tracker.memory.steps.nbytes <= 2.5 * one_step
        served = [
            who for who, answer in zip(names, answers, strict=True) if isinstance(answer, Tensor)
        ]
        for who in served:
            await engine.submit(BackwardJob(StepKey("r1", who, "s"), key, smashed(), 2))
        assert engine._tracker.memory.steps.nbytes == engine._tracker.memory.reserved == 0
        for who in ("x", "y"):
            await engine.submit(forward(key, "s", who))
        with pytest.raises(Busy):
            await engine.submit(forward(key, "s", "z"))
        with pytest.raises(TooLarge):
            await engine.submit(forward(key, "s", "z", samples=6))

    asyncio.run(many())
