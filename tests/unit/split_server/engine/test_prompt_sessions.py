"""A prompt session tunes as a plain torch loop does; the table finds it by its owner."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import NonFinite, StepLost
from protocol.plan import TrainingPlan
from split_server.engine.api import SessionPlan, batch_key
from split_server.engine.prompt_sessions import PromptSession
from split_server.engine.session_table import SessionTable

CPU = torch.device("cpu")

LAYERS, PROMPTS, WIDTH = 3, 4, 8

RATE, DECAY = 0.05, 0.7


def numbers(seed: int, *shape: int) -> Tensor:
    shape = shape or (LAYERS, PROMPTS, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plan(
    round_: int = 1, rounds: int = 4, mean_token: bool = False, **training: Any
) -> SessionPlan:
    given = {
        "optimizer": "sgd",
        "prompt_learning_rate": RATE,
        "tail_learning_rate": 3.0,
        "weight_decay": DECAY,  # applies to the tail alone
        **training,
    }
    return SessionPlan(
        training=TrainingPlan.model_validate(given),
        rounds=rounds,
        round=round_,
        initial=lambda: numbers(0),
        from_mean_token=mean_token,
    )


def begin(
    session_plan: SessionPlan | None = None, steps: int = 5, name: str = "s"
) -> PromptSession:
    return PromptSession.begin(name, steps, session_plan or plan(), CPU, None)


def rate_at(schedule: str, warmup: int, rounds_done: float, rounds: int) -> float:
    """The settings' schedule, in rounds: linear up to 1, then half a cosine down to 0."""
    if rounds_done < warmup:
        return RATE * rounds_done / warmup
    if schedule == "constant":
        return RATE
    angle = math.pi * (rounds_done - warmup) / (rounds - warmup)
    return RATE * (1 + math.cos(angle)) / 2


OPTIMIZERS = {
    "sgd": lambda prompts: torch.optim.SGD([prompts], lr=0.0, momentum=0.9),
    "adam": lambda prompts: torch.optim.Adam([prompts], lr=0.0),
    "adamw": lambda prompts: torch.optim.AdamW([prompts], lr=0.0, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("schedule", "warmup", "round_"), [("cosine", 0, 1), ("cosine", 2, 3), ("constant", 2, 2)]
)
def test_the_prompts_equal_a_plain_loops(
    optimizer: str, schedule: str, warmup: int, round_: int
) -> None:
    steps, rounds = 5, 4
    settings = {"optimizer": optimizer, "schedule": schedule, "warmup_rounds": warmup}
    session = begin(plan(round_, rounds, momentum=0.9, **settings), steps)

    prompts = torch.nn.Parameter(numbers(0))
    plain = OPTIMIZERS[optimizer](prompts)
    for step in range(steps):
        gradient = numbers(step + 1)
        session.apply(gradient.clone())
        prompts.grad = gradient
        done = round_ - 1 + step / steps
        plain.param_groups[0]["lr"] = rate_at(schedule, warmup, done, rounds)
        plain.step()
        assert session.applied == step + 1
        torch.testing.assert_close(
            session.trained_prompts(), prompts.detach(), rtol=1e-6, atol=1e-7
        )
    assert (session.trained_prompts() - numbers(0)).abs().max() > 1e-2


def test_sgd_by_hand() -> None:
    """Round 2 of 2, 2 steps: half a cosine is 1/2, then (1 + cos 135°) / 2."""
    session = begin(plan(2, 2, schedule="cosine"), steps=2)
    session.apply(torch.full((LAYERS, PROMPTS, WIDTH), 10.0))
    torch.testing.assert_close(session.trained_prompts(), numbers(0) - 10 * RATE * 0.5)
    session.apply(torch.full((LAYERS, PROMPTS, WIDTH), -2.0))
    second = (1 - math.sqrt(0.5)) / 2
    torch.testing.assert_close(session.trained_prompts(), numbers(0) - RATE * (5.0 - 2 * second))


def test_gradients_of_a_lower_precision_are_applied_in_float32() -> None:
    session = begin(plan(schedule="constant"))
    session.apply(torch.full((LAYERS, PROMPTS, WIDTH), 2**-12, dtype=torch.bfloat16))
    assert session.prompts.dtype == torch.float32
    torch.testing.assert_close(
        session.trained_prompts(), numbers(0) - RATE * 2**-12, rtol=0, atol=2**-24
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_gradient_that_is_not_finite_gives_no_trained_prompts(bad: float, optimizer: str) -> None:
    session = begin(plan(optimizer=optimizer))
    broken = numbers(2)
    broken[1, 2, 3] = bad
    session.apply(broken)
    session.apply(numbers(3))
    with pytest.raises(NonFinite):
        session.trained_prompts()


def test_prompts_outside_the_range_of_float32_are_not_returned() -> None:
    session = begin(plan(prompt_learning_rate=100.0, schedule="constant"))
    session.apply(torch.full((LAYERS, PROMPTS, WIDTH), 1e38))
    with pytest.raises(NonFinite):
        session.trained_prompts()


def test_trained_prompts_are_a_copy() -> None:
    session = begin()
    first = session.trained_prompts()
    session.apply(numbers(1))
    assert torch.equal(first, numbers(0))
    session.trained_prompts().zero_()
    assert session.trained_prompts().abs().max() > 0


def test_a_session_does_not_change_the_global_state() -> None:
    """A global state's prompts are cached and shared by all sessions."""
    shared = numbers(0)
    made = SessionPlan(plan().training, 4, 1, lambda: shared, from_mean_token=True)
    one = PromptSession.begin("s", 5, made, CPU, numbers(7, 6, 9, WIDTH))
    one.apply(numbers(1))
    assert torch.equal(shared, numbers(0))


def test_the_mean_token_of_the_first_batch_shifts_the_first_layer_alone() -> None:
    patches = numbers(7, 6, 9, WIDTH)  # [B, N, D]
    session = PromptSession.begin("s", 5, plan(mean_token=True), CPU, patches)
    moved = session.trained_prompts() - numbers(0)
    mean = sum(patches.reshape(-1, WIDTH).double()) / 54
    torch.testing.assert_close(moved[0].double(), mean.expand(PROMPTS, -1), rtol=0, atol=1e-6)
    assert not moved[1:].any()
    unshifted = PromptSession.begin("s", 5, plan(), CPU, patches)
    assert torch.equal(unshifted.trained_prompts(), numbers(0))


# The table


def test_a_session_is_found_by_run_participant_and_name() -> None:
    sessions, one, other = SessionTable[PromptSession](), begin(name="s"), begin(name="s")
    sessions.add("r1", "p1", one)
    sessions.add("r1", "p2", other)
    assert sessions.get("r1", "p1", "s") is one
    assert sessions.get("r1", "p2", "s") is other
    for where in (("r2", "p1", "s"), ("r1", "p3", "s"), ("r1", "p1", "t")):
        with pytest.raises(StepLost) as caught:
            sessions.get(*where)
        assert (caught.value.field, caught.value.value) == ("session", where[2])


@pytest.mark.parametrize("name", ["s", "t"])
def test_a_new_session_replaces_the_participants_earlier_one(name: str) -> None:
    sessions, old, new = SessionTable[PromptSession](), begin(name="s"), begin(name=name)
    old.apply(numbers(1))
    sessions.add("r1", "p1", old)
    sessions.add("r1", "p1", new)
    assert sessions.get("r1", "p1", name) is new
    assert torch.equal(new.trained_prompts(), numbers(0))
    assert new.applied == 0
    if name != "s":
        with pytest.raises(StepLost):
            sessions.get("r1", "p1", "s")


def test_sessions_are_dropped_by_participant_or_run() -> None:
    sessions = SessionTable[PromptSession]()
    places = [("r1", "p1"), ("r1", "p2"), ("r2", "p1")]
    for place in places:
        sessions.add(*place, begin())

    def there() -> list[tuple[str, str]]:
        found = []
        for place in places:
            try:
                sessions.get(*place, "s")
            except StepLost:
                continue
            found.append(place)
        return found

    sessions.drop("r1", "p1")
    assert there() == places[1:]
    sessions.drop("r1", "p1")
    sessions.drop("r1")
    assert there() == places[2:]


def test_all_batches_of_all_sessions_have_different_steps() -> None:
    keys = {
        batch_key(run, participant, session, number)
        for run in ("r1", "r2")
        for participant in ("p1", "p2")
        for session in ("a", "a.1", "b")
        for number in (0, 1, 11)
    }
    assert len(keys) == 36
