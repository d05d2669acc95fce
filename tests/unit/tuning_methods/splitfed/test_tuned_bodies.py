"""A tuned body equals one trained with torch alone; each step is applied once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from protocol.errors import (
    Busy,
    IdempotencyKeyReused,
    InternalError,
    InvalidField,
    NonFinite,
    StepLost,
    TooLarge,
    WrongShape,
)
from protocol.plan import RunPlan, TrainingPlan
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.state import save_state
from split_server.engine.api import ForwardJob, StepKey
from split_server.engine.engine import Engine
from split_server.models.body_key import BodyKey
from tests.support.engine import MIB, MakeEngine, engines, gradient_of, prepare_backbone, smashed
from tests.support.federation import SMALL, FakeClock
from tuning_methods.splitfed.tuned_bodies import BodyJob, BodyPlan, BodySession, Direction

CUT, WIDTH, DECAY, ROUNDS, ROUND = 10, 192, 0.1, 4, 2

# AdamW steps by the rate even if a gradient is only rounding error; a small rate hides that.
RATES = {"sgd": 0.05, "adamw": 2e-4}

NUMBERS = 2 * (12 * WIDTH**2 + 13 * WIDTH)  # parameters of blocks 10 and 11

BATCHES = [smashed(3, 1), smashed(3, 2), smashed(2, 3)]

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, momentum=0.9, weight_decay=DECAY),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, weight_decay=DECAY),
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_backbone(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def make() -> Iterator[MakeEngine]:
    with engines() as make_engine:
        yield make_engine


@pytest.fixture
def case(backbone: Path) -> Case:
    return Case(backbone)


class Case:
    """A run whose body is tuned, and the requests of one participant's round."""

    def __init__(
        self, backbone: Path, optimizer: str = "sgd", num_tokens: int | None = None, **more: Any
    ) -> None:
        tuned = {"cut": CUT, "prompt_count": 0, "tune": "full", "tune_body": True}
        given = {
            "optimizer": optimizer,
            "momentum": 0.9,
            "weight_decay": DECAY,
            "prompt_learning_rate": 7.0,  # not used here
            "tail_learning_rate": RATES[optimizer],
            "batch_size": 3,
            **more,
        }
        settings = RunPlan(
            model=SMALL.model_copy(update=tuned), training=TrainingPlan.model_validate(given)
        )
        self.backbone, self.optimizer, self.num_tokens = backbone, optimizer, num_tokens
        self.split = settings.model
        self.key = BodyKey.of(str(backbone), settings)
        self.plan = BodyPlan(settings.training, ROUNDS, ROUND, NUMBERS)

    def forward(self, number: int, steps: int, smashed: Tensor, **of: str) -> BodyJob:
        return self.job("forward", number, steps, smashed, **of)

    def backward(self, number: int, steps: int, gradients: Tensor, **of: str) -> BodyJob:
        return self.job("backward", number, steps, gradients, **of)

    def job(
        self,
        direction: Direction,
        number: int,
        steps: int,
        tensor: Tensor,
        who: str = "p1",
        session: str = "s",
    ) -> BodyJob:
        return BodyJob(
            direction=direction,
            run="r1",
            participant=who,
            session=session,
            number=number,
            steps=steps,
            body=self.key,
            plan=self.plan,
            tensor=tensor,
            fingerprint=hash(float(tensor.double().sum())),
            num_tokens=self.num_tokens,
        )

    async def train(
        self, engine: Engine, batches: Sequence[Tensor], times: int = 1, **of: Any
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run a session, each request repeated; return all responses and the body."""
        responses: list[Tensor] = []

        async def submit(job: BodyJob) -> Tensor:
            repeats = await asyncio.gather(*(engine.submit(job) for _ in range(times)))
            repeats.append(await engine.submit(job))
            assert all(torch.equal(repeats[0], repeat) for repeat in repeats)
            responses.append(repeats[0])
            return repeats[0]

        for number, batch in enumerate(batches):
            features = await submit(self.forward(number, len(batches), batch, **of))
            await submit(self.backward(number, len(batches), gradient_of(features), **of))
        who, session = of.get("who", "p1"), of.get("session", "s")
        return responses, engine.trained_state("r1", who, session)

    def by_hand(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Compute the same with timm's blocks, torch's optimiser and half a cosine."""
        model = timm.create_model(SMALL.backbone, img_size=SMALL.image_size, num_classes=2).eval()
        model.load_state_dict(dict(open_backbone(self.backbone)), strict=False)
        blocks = model.blocks[CUT:]
        optimizer = OPTIMIZERS[self.optimizer](list(blocks.parameters()))
        responses, rate = [], RATES[self.optimizer]
        for step, batch in enumerate(batches):
            leaf = batch.clone().requires_grad_()
            features = blocks(leaf)[:, : self.num_tokens]
            done = (ROUND - 1 + step / len(batches)) / ROUNDS
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            features.backward(gradient_of(features.detach()))
            optimizer.step()
            assert leaf.grad is not None
            responses += [features.detach(), leaf.grad]
        named = model.state_dict()
        tuned = [f"blocks.{number}." for number in (10, 11)]
        body = {"body." + n: t for n, t in named.items() if n.startswith(tuple(tuned))}
        return responses, body

    def initial(self) -> dict[str, Tensor]:
        return self.by_hand([])[1]


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5, msg=name)


# Results


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("num_tokens", [None, 1])
def test_features_gradients_and_body_equal_torch_alone(
    make: MakeEngine, backbone: Path, optimizer: str, backward: str, num_tokens: int | None
) -> None:
    case = Case(backbone, optimizer, num_tokens)
    responses, body = asyncio.run(case.train(make(backward=backward), BATCHES))
    expected, tuned = case.by_hand(BATCHES)
    for response, reference in zip(responses, expected, strict=True):
        torch.testing.assert_close(response, reference, rtol=0, atol=1e-5)
    assert_close(body, tuned)
    initial = case.initial()
    assert all((tuned[name] - initial[name]).abs().max() > 1e-5 for name in tuned)


def test_participants_do_not_affect_each_other(make: MakeEngine, case: Case) -> None:
    engine = make()
    others = [smashed(3, seed) for seed in (11, 12)]

    async def both() -> list[Any]:
        return await asyncio.gather(
            case.train(engine, BATCHES, who="p1"), case.train(engine, others, who="p2")
        )

    for (_, body), batches in zip(asyncio.run(both()), (BATCHES, others), strict=True):
        assert_close(body, case.by_hand(batches)[1])


def test_a_session_begins_with_the_global_states_body(
    make: MakeEngine, case: Case, tmp_path: Path
) -> None:
    moved = {name: tensor + 0.01 for name, tensor in case.initial().items()}
    save_state(moved, tmp_path / "state.safetensors")
    case.key = replace(case.key, state=tmp_path / "state.safetensors")
    engine = make()
    features = asyncio.run(engine.submit(case.forward(0, 1, BATCHES[0])))
    whole = timm.create_model(SMALL.backbone, img_size=SMALL.image_size, num_classes=2).eval()
    weights = {name.removeprefix("body."): tensor for name, tensor in moved.items()}
    whole.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = whole.blocks[CUT:](BATCHES[0])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


# Repeated and misordered requests


def test_a_repeat_gets_the_same_response_and_is_not_applied_twice(
    make: MakeEngine, case: Case
) -> None:
    responses, body = asyncio.run(case.train(make(), BATCHES, times=3))
    undisturbed, once = asyncio.run(case.train(make(), BATCHES))
    pairs = zip(responses, undisturbed, strict=True)
    assert all(torch.equal(repeated, single) for repeated, single in pairs)
    assert all(torch.equal(body[name], once[name]) for name in once)


def test_a_number_takes_one_request_only(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def reuse() -> None:
        features = await engine.submit(case.forward(0, 2, BATCHES[0]))
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(case.forward(0, 2, BATCHES[1]))
        gradients = gradient_of(features)
        await engine.submit(case.backward(0, 2, gradients))
        with pytest.raises(IdempotencyKeyReused):
            await engine.submit(case.backward(0, 2, 2 * gradients))

    asyncio.run(reuse())
    assert engine._find_session("r1", "p1", "s").applied == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_misordered_request_is_lost_and_changes_nothing(
    make: MakeEngine, case: Case, direction: Direction, number: int
) -> None:
    """After step 1's forward, only its repeat and its backward are in order."""
    engine = make()

    async def out_of_order() -> dict[str, Tensor]:
        for place in (0, 1):
            features = await engine.submit(case.forward(place, 3, BATCHES[place]))
            if place == 0:
                await engine.submit(case.backward(0, 3, gradient_of(features)))
        other = BATCHES[2] if direction == "forward" else 2 * gradient_of(features)
        with pytest.raises((IdempotencyKeyReused, StepLost)):
            await engine.submit(case.job(direction, number, 3, other))
        await engine.submit(case.backward(1, 3, gradient_of(features)))
        features = await engine.submit(case.forward(2, 3, BATCHES[2]))
        await engine.submit(case.backward(2, 3, gradient_of(features)))
        return engine.trained_state("r1", "p1", "s")

    assert_close(asyncio.run(out_of_order()), case.by_hand(BATCHES)[1])


def test_steps_and_gradient_shapes_are_checked(make: MakeEngine, case: Case) -> None:
    engine = make()

    async def wrong() -> None:
        features = await engine.submit(case.forward(0, 2, BATCHES[0]))
        with pytest.raises(InvalidField, match="steps"):
            await engine.submit(case.backward(0, 3, gradient_of(features)))
        with pytest.raises(WrongShape, match="gradients"):
            await engine.submit(case.backward(0, 2, gradient_of(features)[:1]))
        await engine.submit(case.backward(0, 2, gradient_of(features)))

    asyncio.run(wrong())


def test_the_trained_state_is_that_of_a_finished_and_finite_session(
    make: MakeEngine, case: Case
) -> None:
    engine = make()

    async def whole() -> None:
        with pytest.raises(StepLost):
            engine.trained_state("r1", "p1", "s")
        features = await engine.submit(case.forward(0, 1, BATCHES[0]))
        with pytest.raises(StepLost):
            engine.trained_state("r1", "p1", "s")
        huge = torch.full_like(features, 3e38)
        await engine.submit(case.backward(0, 1, huge))
        with pytest.raises(NonFinite):
            engine.trained_state("r1", "p1", "s")

    asyncio.run(whole())


def test_a_failed_backward_ends_the_session(
    make: MakeEngine, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("half a step")

    async def broken_off() -> dict[str, Tensor]:
        features = await engine.submit(case.forward(0, 3, BATCHES[0]))
        job = case.backward(0, 3, gradient_of(features))
        with monkeypatch.context() as patched:
            patched.setattr(BodySession, "backward", broken)
            with pytest.raises(InternalError):
                await engine.submit(job)
        with pytest.raises(StepLost):
            await engine.submit(job)
        assert engine._tracker.memory.taken == 0
        return (await case.train(engine, BATCHES, session="second"))[1]

    assert_close(asyncio.run(broken_off()), case.by_hand(BATCHES)[1])


# Memory


@pytest.mark.parametrize(("optimizer", "kinds"), [("sgd", 3), ("adamw", 4)])
def test_a_sessions_memory_has_weights_gradients_moments_and_a_step(
    make: MakeEngine, backbone: Path, optimizer: str, kinds: int
) -> None:
    case, engine = Case(backbone, optimizer), make()
    asyncio.run(engine.submit(case.forward(0, 2, BATCHES[0])))
    weights = kinds * 4 * NUMBERS
    taken = engine._tracker.memory.taken
    # A step: 3 samples of 5 tokens, two blocks of some twenty tensors of a token's width.
    assert weights + 3 * 5 * WIDTH * 4 < taken < weights + 2 * 40 * 3 * 5 * WIDTH * 4
    engine.release("r1", "p2")
    assert engine._tracker.memory.taken == taken
    engine.release("r1", "p1")
    assert engine._tracker.memory.taken == 0


def test_a_session_without_memory_is_busy_until_another_ends(make: MakeEngine, case: Case) -> None:
    engine = make(retained=int(1.5 * case.plan.nbytes))

    async def sessions() -> None:
        await case.train(engine, BATCHES, who="p1")
        with pytest.raises(Busy) as caught:
            await engine.submit(case.forward(0, 3, BATCHES[0], who="p2"))
        assert caught.value.retry_after_s is not None
        engine.release("r1", "p1")  # as after its update
        _, body = await case.train(engine, BATCHES, who="p2")
        assert_close(body, case.by_hand(BATCHES)[1])
        await case.train(
            engine, BATCHES, who="p2", session="second"
        )  # replaces its earlier session
        engine.release("r1")
        assert engine._tracker.memory.taken == 0

    asyncio.run(sessions())


@pytest.mark.parametrize("backward", ["auto", "retained", "recompute"])
def test_a_body_that_never_fits_is_refused_with_its_size(
    make: MakeEngine, case: Case, backward: str
) -> None:
    engine = make(retained=case.plan.nbytes, backward=backward)
    with pytest.raises(TooLarge) as caught:
        asyncio.run(engine.submit(case.forward(0, 3, BATCHES[0])))
    assert caught.value.field == "tune_body"
    assert caught.value.limit == case.plan.nbytes
    assert isinstance(caught.value.value, int)
    assert caught.value.value > case.plan.nbytes
    assert engine._tracker.memory.taken == 0


def test_without_memory_for_a_graph_the_forward_is_recomputed(make: MakeEngine, case: Case) -> None:
    engine = make(retained=case.plan.nbytes + 3 * BATCHES[0].numel() * 4)  # two responses
    learn = engine._tracker.memory.sizes.learn
    learn(case.key, BATCHES[0], 100 * BATCHES[0].numel() * 4)  # measured in another round
    _, body = asyncio.run(case.train(engine, BATCHES))
    assert cast(BodySession, engine._find_session("r1", "p1", "s")).retention == "input"
    assert_close(body, case.by_hand(BATCHES)[1])


def test_an_abandoned_session_expires(make: MakeEngine, case: Case) -> None:
    time = FakeClock()
    engine = make(time=time)
    features = asyncio.run(engine.submit(case.forward(0, 2, BATCHES[0])))
    time.now += 299
    engine.sweep()
    asyncio.run(engine.submit(case.backward(0, 2, gradient_of(features))))
    time.now += 299  # since the backward
    engine.sweep()
    assert engine._tracker.memory.taken > 0
    time.now += 2
    engine.sweep()
    assert engine._tracker.memory.taken == 0
    with pytest.raises(StepLost):
        asyncio.run(engine.submit(case.forward(1, 2, BATCHES[1])))


def test_a_session_and_a_frozen_bodys_step_share_the_memory_budget(
    make: MakeEngine, case: Case
) -> None:
    engine = make(retained=case.plan.nbytes + MIB, backward="retained")
    frozen = replace(case.key, settings=case.split.replace(tune_body=False, num_classes=2))
    job = ForwardJob(StepKey("r2", "p1", "a"), frozen, smashed(8, 5), 1)

    async def both() -> None:
        await engine.submit(case.forward(0, 1, BATCHES[0]))
        with pytest.raises(Busy):
            await engine.submit(job)
        engine.release("r1")
        await engine.submit(job)

    asyncio.run(both())
