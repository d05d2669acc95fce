"""Exchanges: the prompts that they tune are those of a plain loop over the uncut model's blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import split_model
from protocol.errors import (
    Busy,
    IdempotencyKeyReused,
    InternalError,
    NonFinite,
    StepLost,
    TooLarge,
    WrongShape,
)
from protocol.settings import RunSettings, TrainingSettings
from split_model import SplitSettings
from split_model.libraries import timm
from split_server import compute
from split_server.bodies import Bodies, BodyKey
from split_server.devices import choose_placement
from split_server.engine import EngineLimits, ExchangeJob, InferJob, LocalEngine
from split_server.sessions import SessionPlan
from tests.server_doubles import SMALL, FakeTime

MIB = 1024 * 1024
PLACEMENT = choose_placement("cpu", "float32")
PREFIX, PATCHES, PROMPTS, WIDTH = 1, 4, 2, 192
TOKENS = PREFIX + PATCHES
DEPTHS = ["shallow", "deep"]
RATE = 0.5


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("backbones")
    return split_model.prepare_backbone(SplitSettings.of(SMALL), "random:0", cache).path


@pytest.fixture(scope="module")
def bodies() -> Bodies:
    return Bodies(PLACEMENT)


MakeEngine = Callable[..., LocalEngine]


@pytest.fixture
def make(bodies: Bodies) -> Iterator[MakeEngine]:
    made: list[LocalEngine] = []

    def one(retained: int = 256 * MIB, time: FakeTime | None = None) -> LocalEngine:
        limits = EngineLimits(retained, 64 * MIB, 64 * MIB, 300.0, 4)
        made.append(LocalEngine(bodies, PLACEMENT, limits, (time or FakeTime()).clock()))
        return made[-1]

    yield one
    for engine in made:
        engine.close()


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smashed(batch: int = 3, seed: int = 0) -> Tensor:
    """[B, T, D], without prompts."""
    return numbers(seed, batch, TOKENS, WIDTH)


class Case:
    """A run with its prompts at the cut, and the requests of one participant's round."""

    def __init__(self, backbone: Path, depth: str, leading: int | None = None) -> None:
        model = SMALL.model_copy(update={"prompt_at": "cut", "prompt_depth": depth})
        self.training = TrainingSettings(
            optimizer="sgd", momentum=0.9, prompt_learning_rate=RATE, schedule="constant"
        )
        settings = RunSettings(model=model, training=self.training)
        self.split = SplitSettings.of(model)
        self.key = BodyKey.of(str(backbone), settings)
        self.leading = leading
        self.initial = 0.3 * numbers(99, *split_model.prompt_shape(self.split))
        self.backbone = backbone

    @property
    def plan(self) -> SessionPlan:
        return SessionPlan(self.training, rounds=4, round=1, initial=lambda: self.initial)

    def job(
        self,
        number: int,
        steps: int,
        batch: Tensor | None,
        gradients: Tensor | None = None,
        *,
        who: str = "p1",
        session: str = "s",
    ) -> ExchangeJob:
        known = [tensor for tensor in (batch, gradients) if tensor is not None]
        return ExchangeJob(
            run="r1",
            participant=who,
            session=session,
            number=number,
            steps=steps,
            body=self.key,
            plan=self.plan,
            gradients=gradients,
            smashed=batch,
            fingerprint=hash(tuple(float(tensor.double().sum()) for tensor in known)),
            leading=self.leading,
        )

    async def train(
        self, engine: LocalEngine, batches: Sequence[Tensor], **of: Any
    ) -> tuple[list[Tensor], Tensor]:
        """A whole session: the features of every batch, and the prompts that it leaves."""
        gradients: Tensor | None = None
        features = []
        for number, batch in enumerate(batches):
            job = self.job(number, len(batches), batch, gradients, **of)
            features.append(await engine.exchange(job))
            gradients = gradient_of(features[-1])
        last = self.job(len(batches), len(batches), None, gradients, **of)
        assert (await engine.exchange(last)).numel() == 0
        return features, engine.trained("r1", of.get("who", "p1"), of.get("session", "s"))

    def by_hand(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The same with timm's own blocks and torch's own optimiser."""
        model = timm.create_model(SMALL.backbone, img_size=SMALL.image_size, num_classes=2).eval()
        model.load_state_dict(dict(split_model.open_backbone(self.backbone)), strict=False)
        model.requires_grad_(False)
        prompts = nn.Parameter(self.initial.clone())
        optimizer = torch.optim.SGD([prompts], lr=RATE, momentum=0.9)
        features = []
        for batch in batches:
            tokens = batch
            for place, block in enumerate(model.blocks[SMALL.cut :]):
                if place < len(prompts):
                    own = prompts[place].expand(len(batch), -1, -1)
                    patches = tokens[:, -PATCHES:]
                    tokens = torch.cat([tokens[:, :PREFIX], own, patches], dim=1)
                tokens = block(tokens)
            read = tokens if self.leading is None else tokens[:, : self.leading]
            optimizer.zero_grad()
            torch.sin(read).mean().backward()
            optimizer.step()
            features.append(read.detach())
        return features, prompts.detach()


def gradient_of(features: Tensor) -> Tensor:
    """Of mean(sin(features)), as a device's loss would have one."""
    return torch.cos(features) / features.numel()


@pytest.fixture(params=DEPTHS)
def case(request: pytest.FixtureRequest, backbone: Path) -> Case:
    return Case(backbone, request.param)


BATCHES = [smashed(3, 1), smashed(3, 2), smashed(2, 3), smashed(3, 4)]


# The same numbers


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("leading", [None, 1, 3])
def test_features_and_prompts_are_those_of_the_uncut_models_blocks(
    make: MakeEngine, backbone: Path, depth: str, leading: int | None
) -> None:
    case = Case(backbone, depth, leading)
    features, prompts = asyncio.run(case.train(make(), BATCHES))
    expected, tuned = case.by_hand(BATCHES)
    for one, other in zip(features, expected, strict=True):
        assert one.shape[1] == (TOKENS + PROMPTS if leading is None else leading)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prompts, tuned, rtol=1e-5, atol=1e-6)
    moved = (tuned - case.initial).abs().amax(dim=(1, 2))
    assert len(moved) == (11 if depth == "deep" else 1)
    assert moved.min() > 1e-4, "the comparison is not of prompts that stand still"


@pytest.mark.parametrize("leading", [None, 1])
def test_inference_with_the_prompts_gives_the_same_features(
    make: MakeEngine, case: Case, leading: int | None
) -> None:
    case.leading = leading
    job = InferJob(case.key, BATCHES[0], case.initial, leading)
    features = asyncio.run(make().infer(job))
    torch.testing.assert_close(features, case.by_hand(BATCHES[:1])[0][0], rtol=1e-5, atol=1e-5)
    assert not features.requires_grad


def test_the_mean_of_the_patch_tokens_shifts_the_prompts_where_it_is_asked_for(
    make: MakeEngine, case: Case
) -> None:
    job = case.job(0, 1, BATCHES[0])
    engine = make()
    asyncio.run(engine.exchange(replace(job, plan=replace(job.plan, from_mean_token=True))))
    mean = BATCHES[0][:, PREFIX:].reshape(-1, WIDTH).double().mean(dim=0)
    shifted = case.initial.clone()
    shifted[0] += mean.float()
    found = engine._sessions.get("r1", "p1", "s").trained()
    torch.testing.assert_close(found, shifted, rtol=0, atol=1e-6)


def test_participants_do_not_meet(make: MakeEngine, case: Case) -> None:
    engine, alone = make(), make()
    others = [smashed(3, seed) for seed in (11, 12)]

    async def both() -> list[tuple[list[Tensor], Tensor]]:
        return await asyncio.gather(
            case.train(engine, BATCHES, who="p1"), case.train(engine, others, who="p2")
        )

    for (features, prompts), batches in zip(asyncio.run(both()), (BATCHES, others), strict=True):
        expected, tuned = asyncio.run(case.train(alone, batches))
        assert all(torch.equal(one, other) for one, other in zip(features, expected, strict=True))
        assert torch.equal(prompts, tuned)


# Repeats, and what comes out of order


def test_a_repeat_gets_the_same_answer_and_tunes_nothing_twice(
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

    async def stammering() -> None:
        gradients: Tensor | None = None
        for number, batch in enumerate([*BATCHES, None]):
            job = case.job(number, 4, batch, gradients)
            answers = await asyncio.gather(*(engine.exchange(job) for _ in range(3)))
            answers.append(await engine.exchange(job))
            assert all(torch.equal(answers[0], one) for one in answers)
            if batch is not None:
                assert torch.equal(answers[0], undisturbed[number])
                gradients = gradient_of(answers[0])
        assert torch.equal(engine.trained("r1", "p1", "s"), tuned)

    asyncio.run(stammering())
    assert ran == {"forward": 4, "backward": 4}


def test_a_number_cannot_be_two_requests(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def reuse() -> None:
        first = await engine.exchange(case.job(0, 4, BATCHES[0]))
        with pytest.raises(IdempotencyKeyReused):
            await engine.exchange(case.job(0, 4, BATCHES[1]))
        await engine.exchange(case.job(1, 4, BATCHES[1], gradient_of(first)))
        with pytest.raises(IdempotencyKeyReused):
            await engine.exchange(case.job(1, 4, BATCHES[1], gradient_of(first) * 2))

    asyncio.run(reuse())
    assert engine._sessions.get("r1", "p1", "s").applied == 1


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_a_request_out_of_order_is_lost(make: MakeEngine, case: Case, number: int) -> None:
    """After the answer to request 2 only its repeat and request 3 are in order."""
    engine = make()

    async def out_of_order() -> None:
        gradients: Tensor | None = None
        for place in range(3):
            features = await engine.exchange(case.job(place, 5, BATCHES[place], gradients))
            gradients = gradient_of(features)
        before = engine._sessions.get("r1", "p1", "s").trained()
        job = case.job(number, 5, BATCHES[3], gradients)
        if number == 0:  # from the start: the session is begun anew
            await engine.exchange(replace(job, gradients=None))
            assert torch.equal(engine._sessions.get("r1", "p1", "s").trained(), case.initial)
        elif number == 3:
            await engine.exchange(job)
            assert engine._sessions.get("r1", "p1", "s").applied == 3
        else:
            with pytest.raises(StepLost):
                await engine.exchange(job)
            assert torch.equal(engine._sessions.get("r1", "p1", "s").trained(), before)
            await engine.exchange(case.job(3, 5, BATCHES[3], gradients))  # it goes on

    asyncio.run(out_of_order())


def test_a_session_that_is_not_here_is_lost(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def lost() -> None:
        features = await engine.exchange(case.job(0, 2, BATCHES[0]))
        gradients = gradient_of(features)
        for of in ({"who": "p2"}, {"session": "t"}):
            with pytest.raises(StepLost):
                await engine.exchange(case.job(1, 2, BATCHES[1], gradients, **of))
            with pytest.raises(StepLost):
                await engine.exchange(case.job(2, 2, None, gradients, **of))
        assert len(engine._steps) == 1

    asyncio.run(lost())


def test_prompts_are_given_out_at_the_end_alone(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def unfinished() -> None:
        with pytest.raises(StepLost):
            engine.trained("r1", "p1", "s")
        features = await engine.exchange(case.job(0, 2, BATCHES[0]))
        with pytest.raises(StepLost):
            engine.trained("r1", "p1", "s")
        features = await engine.exchange(case.job(1, 2, BATCHES[1], gradient_of(features)))
        with pytest.raises(StepLost):
            engine.trained("r1", "p1", "s")
        await engine.exchange(case.job(2, 2, None, gradient_of(features)))
        for who, name in (("p2", "s"), ("p1", "t")):
            with pytest.raises(StepLost):
                engine.trained("r1", who, name)

    asyncio.run(unfinished())
    assert torch.equal(engine.trained("r1", "p1", "s"), engine.trained("r1", "p1", "s"))
    assert len(engine._steps) == engine._steps.nbytes == engine._reserved_bytes == 0


def test_begun_anew_it_forgets_what_was_before(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def twice() -> tuple[Any, Any]:
        features = await engine.exchange(case.job(0, 4, smashed(3, 77), session="old"))
        await engine.exchange(case.job(1, 4, smashed(3, 78), gradient_of(features), session="old"))
        anew = await case.train(engine, BATCHES, session="new")
        with pytest.raises(StepLost):
            await engine.exchange(case.job(2, 4, BATCHES[0], gradient_of(features), session="old"))
        return anew

    features, prompts = asyncio.run(twice())
    undisturbed, tuned = asyncio.run(case.train(make(), BATCHES))
    assert all(torch.equal(one, other) for one, other in zip(features, undisturbed, strict=True))
    assert torch.equal(prompts, tuned)
    assert len(engine._steps) == 0


# What goes wrong


@pytest.mark.parametrize(
    ("trouble", "answer"),
    [(ZeroDivisionError(), InternalError), (torch.OutOfMemoryError("full"), Busy)],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_forward_that_failed_can_be_repeated(
    make: MakeEngine,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Exception,
    answer: type[Exception],
    number: int,
) -> None:
    """The gradients that came with it have been applied, and are not applied again."""
    undisturbed, tuned = asyncio.run(case.train(make(), BATCHES))
    engine, real, failures = make(), compute.run_forward, [trouble, trouble]

    def failing(body: Any, tensor: Tensor, *more: Any) -> Any:
        if failures and torch.equal(tensor, BATCHES[number]):
            raise failures.pop()
        return real(body, tensor, *more)

    monkeypatch.setattr(compute, "run_forward", failing)

    async def shaken() -> None:
        gradients: Tensor | None = None
        for place, batch in enumerate([*BATCHES, None]):
            job = case.job(place, 4, batch, gradients)
            for _ in range(2 if place == number else 0):
                with pytest.raises(answer):
                    await engine.exchange(job)
            features = await engine.exchange(job)
            if batch is not None:
                assert torch.equal(features, undisturbed[place])
                gradients = gradient_of(features)

    asyncio.run(shaken())
    assert not failures
    assert torch.equal(engine.trained("r1", "p1", "s"), tuned)
    assert len(engine._steps) == engine._steps.nbytes == engine._reserved_bytes == 0


def test_bad_tensors_are_refused_and_change_nothing(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def refusals() -> None:
        features = await engine.exchange(case.job(0, 1, BATCHES[0]))
        good = gradient_of(features)
        bad = good.clone()
        bad[1, 2, 3] = float("nan")
        with pytest.raises(NonFinite):
            await engine.exchange(case.job(1, 1, None, bad))
        with pytest.raises(NonFinite):
            await engine.exchange(case.job(0, 1, BATCHES[0] * torch.inf, who="p2"))
        with pytest.raises(WrongShape):
            await engine.exchange(case.job(1, 1, None, good[:2]))
        assert engine._sessions.get("r1", "p1", "s").applied == 0
        await engine.exchange(case.job(1, 1, None, good))

    asyncio.run(refusals())
    assert torch.equal(
        engine.trained("r1", "p1", "s"), asyncio.run(case.train(make(), BATCHES[:1]))[1]
    )


def test_gradients_that_leave_the_range_of_float32_change_nothing(
    make: MakeEngine, case: Case
) -> None:
    engine = make()

    async def overflow() -> None:
        features = await engine.exchange(case.job(0, 1, BATCHES[0]))
        huge = torch.full_like(features, 3e38)
        with pytest.raises(NonFinite):
            await engine.exchange(case.job(1, 1, None, huge))
        session = engine._sessions.get("r1", "p1", "s")
        assert torch.equal(session.trained(), case.initial)
        with pytest.raises(StepLost):  # its graph is spent: the device must begin anew
            await engine.exchange(case.job(1, 1, None, gradient_of(features)))
        assert len(engine._steps) == engine._steps.nbytes == engine._reserved_bytes == 0
        await case.train(engine, BATCHES[:1], session="t")

    asyncio.run(overflow())


def test_a_backward_that_broke_off_makes_the_device_begin_anew(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = make(), compute.run_backward
    tuned = asyncio.run(case.train(make(), BATCHES))[1]

    async def broken_off() -> Tensor:
        features = await engine.exchange(case.job(0, 4, BATCHES[0]))

        def full(*arguments: Any) -> Tensor:
            real(*arguments)
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(compute, "run_backward", full)
        job = case.job(1, 4, BATCHES[1], gradient_of(features))
        with pytest.raises(Busy):
            await engine.exchange(job)
        monkeypatch.setattr(compute, "run_backward", real)
        with pytest.raises(StepLost):
            await engine.exchange(job)
        return (await case.train(engine, BATCHES))[1]

    assert torch.equal(asyncio.run(broken_off()), tuned)


def test_a_batch_whose_gradients_come_too_late_is_lost(make: MakeEngine, case: Case) -> None:
    time = FakeTime()
    engine = make(time=time)

    async def late() -> None:
        features = await engine.exchange(case.job(0, 2, BATCHES[0]))
        time.now += 301
        engine.sweep()
        assert engine._steps.nbytes == 0
        with pytest.raises(StepLost):
            await engine.exchange(case.job(1, 2, BATCHES[1], gradient_of(features)))
        await case.train(engine, BATCHES, session="anew")

    asyncio.run(late())


# Release


@pytest.mark.parametrize("release", [("r1",), ("r1", "p1")])
def test_a_release_frees_session_and_steps(
    make: MakeEngine, case: Case, release: tuple[str, ...]
) -> None:
    engine = make()

    async def released() -> None:
        features = await engine.exchange(case.job(0, 2, BATCHES[0]))
        await case.train(engine, BATCHES, who="p2")
        engine.release("r2")
        engine.release("r1", "p3")
        assert len(engine._steps) == 1
        engine.release(*release)
        assert len(engine._steps) == engine._steps.nbytes == 0
        with pytest.raises(StepLost):
            await engine.exchange(case.job(1, 2, BATCHES[1], gradient_of(features)))
        if len(release) == 1:
            with pytest.raises(StepLost):
                engine.trained("r1", "p2", "s")
        else:
            engine.trained("r1", "p2", "s")

    asyncio.run(released())


@pytest.mark.parametrize("number", [0, 1])
def test_an_exchange_whose_round_ended_while_it_ran_leaves_nothing(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    engine, real = make(), compute.run_forward

    def overtaken(body: Any, tensor: Tensor, *more: Any) -> Any:
        if torch.equal(tensor, BATCHES[number]):
            engine.release("r1")
        return real(body, tensor, *more)

    monkeypatch.setattr(compute, "run_forward", overtaken)

    async def ended() -> None:
        gradients: Tensor | None = None
        for place in range(number + 1):
            features = await engine.exchange(case.job(place, 3, BATCHES[place], gradients))
            gradients = gradient_of(features)
        with pytest.raises(StepLost):
            await engine.exchange(case.job(number + 1, 3, BATCHES[2], gradients))

    asyncio.run(ended())
    assert len(engine._steps) == engine._steps.nbytes == engine._reserved_bytes == 0


# Memory


def room_of_a_step(engine: LocalEngine, case: Case, batch: Tensor) -> int:
    asyncio.run(engine.exchange(case.job(0, 1, batch)))
    return engine._steps.nbytes


def test_one_steps_room_is_enough_for_a_whole_session(make: MakeEngine, case: Case) -> None:
    """Whatever order larger and smaller batches come in, and whoever begins anew."""
    one_step = room_of_a_step(make(), case, smashed(4))
    assert one_step > 11 * 4 * (TOKENS + PROMPTS) * WIDTH * 4 * 2, "blocks save their inputs"
    engine = make(retained=one_step)
    batches = [smashed(size, seed) for seed, size in enumerate((4, 4, 1, 4, 3, 4))]

    async def sessions() -> None:
        await case.train(engine, batches, session="first")
        await engine.exchange(case.job(0, 6, batches[0], session="given up"))
        assert engine._steps.nbytes == one_step
        await case.train(engine, batches, session="begun anew")
        assert engine._steps.nbytes == engine._reserved_bytes == 0
        with pytest.raises(TooLarge):
            await engine.exchange(case.job(0, 1, smashed(5)))

    asyncio.run(sessions())


def test_others_wait_while_the_room_is_taken(make: MakeEngine, case: Case) -> None:
    engine = make(retained=room_of_a_step(make(), case, smashed(4)))

    async def crowd() -> None:
        await engine.exchange(case.job(0, 1, smashed(4), who="p1"))
        with pytest.raises(Busy) as caught:
            await engine.exchange(case.job(0, 1, smashed(4), who="p2"))
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 0
        features = await engine.exchange(case.job(0, 1, smashed(4), who="p1"))  # a repeat
        await engine.exchange(case.job(1, 1, None, gradient_of(features), who="p1"))
        await case.train(engine, [smashed(4)], who="p2")

    asyncio.run(crowd())


def test_nobody_takes_the_room_between_one_batch_and_the_next(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = room_of_a_step(make(), case, smashed(4))
    engine, real = make(retained=limit), compute.run_forward
    batches = [smashed(4, seed) for seed in range(3)]
    answers: list[Any] = []

    async def crowd() -> None:
        loop = asyncio.get_running_loop()

        def watched(body: Any, tensor: Tensor, *more: Any) -> Any:
            assert engine._steps.nbytes <= limit
            if not answers and torch.equal(tensor, batches[1]):
                other = engine.exchange(case.job(0, 1, smashed(4), who="p2"))
                answers.append(asyncio.run_coroutine_threadsafe(other, loop))
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(20)
            return real(body, tensor, *more)

        monkeypatch.setattr(compute, "run_forward", watched)
        await case.train(engine, batches, who="p1")
        with pytest.raises(Busy):
            await asyncio.wrap_future(answers[0])
        await case.train(engine, batches, who="p2")

    asyncio.run(crowd())
