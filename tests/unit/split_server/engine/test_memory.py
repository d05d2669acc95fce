"""A participant with as many open steps as it may have, where the memory for them is full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from protocol.errors import Busy, StepLost
from split_server.engine.api import BackwardJob, ForwardJob, StepKey
from split_server.models.body_key import BodyKey
from tests.support.engine import MakeEngine, engines, input_body
from tests.support.federation import smashed

STEP = 2 * smashed().nbytes  # input and answer


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    with engines() as made:
        yield made


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> BodyKey:
    return input_body(tmp_path_factory.mktemp("backbones"))


def forward(key: BodyKey, name: str, who: str = "p1", samples: int = 2) -> ForwardJob:
    tensor: Tensor = smashed(samples)
    return ForwardJob(StepKey("r1", who, name), key, tensor, fingerprint=1)


def test_its_oldest_step_makes_room_and_nobody_elses(make: MakeEngine, key: BodyKey) -> None:
    engine = make(retained=5 * STEP, backward="recompute")  # four steps a participant

    async def steps() -> None:
        await engine.submit(forward(key, "s", "p2"))
        for name in "abcdef":
            await engine.submit(forward(key, name))
            assert engine._tracker.memory.taken <= 5 * STEP
        with pytest.raises(Busy):  # which has one, and may have more
            await engine.submit(forward(key, "t", "p2"))
        for lost in "ab":
            with pytest.raises(StepLost):
                await engine.submit(BackwardJob(StepKey("r1", "p1", lost), key, smashed(), 2))
        for who, name in (("p1", "c"), ("p1", "f"), ("p2", "s")):
            job = BackwardJob(StepKey("r1", who, name), key, smashed(seed=1), 2)
            assert torch.isfinite(await engine.submit(job)).all()

    asyncio.run(steps())
    assert engine._tracker.memory.taken == 2 * STEP


def test_many_forwards_at_once_do_not_share_one_steps_room(make: MakeEngine, key: BodyKey) -> None:
    """The oldest is large, and the others are small."""
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


def test_a_step_that_would_not_make_room_enough_stays(make: MakeEngine, key: BodyKey) -> None:
    engine = make(retained=4 * STEP, backward="recompute")

    async def steps() -> None:
        for name in "abcd":
            await engine.submit(forward(key, name))
        with pytest.raises(Busy):
            await engine.submit(forward(key, "e", samples=4))
        await engine.submit(BackwardJob(StepKey("r1", "p1", "a"), key, smashed(seed=1), 2))

    asyncio.run(steps())
