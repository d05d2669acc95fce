"""Learning rates against values computed by hand, and the optimiser's two groups."""

import math

import pytest
import torch
from torch import nn

from protocol.plan import TrainingPlan
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress


def factors(rounds: int, *progress: float, **settings: object) -> list[float]:
    training = TrainingPlan.model_validate(settings)
    return [learning_rate_factor(training, value, rounds) for value in progress]


def test_cosine_from_1_to_0() -> None:
    got = factors(8, 0, 0.25, 1 / 3, 0.5, 1, schedule="cosine")
    assert got == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.75, 0.5, 0])


def test_warm_up_then_cosine_over_the_rest() -> None:
    got = factors(10, 0, 0.1, 0.2, 0.6, 0.8, 1, schedule="cosine", warmup_rounds=2)
    assert got == pytest.approx([0, 0.5, 1, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


def test_warm_up_then_constant() -> None:
    got = factors(4, 0, 0.125, 0.25, 0.9, 1, schedule="constant", warmup_rounds=1)
    assert got == pytest.approx([0, 0.5, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_as_long_as_the_run_or_longer(schedule: str) -> None:
    for warmup in (3, 7):
        got = factors(3, 0, 0.5, 0.99, 1, schedule=schedule, warmup_rounds=warmup)
        assert got == pytest.approx([0, 0.5, 0.99, 1])


def parts() -> tuple[nn.Parameter, nn.Linear]:
    return nn.Parameter(torch.ones(2, 3)), nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_prompts_and_tail_have_their_own_rates(name: str, kind: type) -> None:
    prompts, tail = parts()
    training = TrainingPlan(
        optimizer=name,
        prompt_learning_rate=0.3,
        tail_learning_rate=0.02,
        weight_decay=0.1,
        momentum=0.7,
    )
    optimizer = make_optimizer(training, prompts, tail, scale=0.5)
    assert type(optimizer) is kind
    first, second = optimizer.param_groups
    assert first["params"][0] is prompts
    assert {id(p) for p in second["params"]} == {id(p) for p in tail.parameters()}
    assert (first["lr"], second["lr"]) == (0.15, 0.01)
    assert (first["weight_decay"], second["weight_decay"]) == (0.0, 0.1)
    if name == "sgd":
        assert first["momentum"] == second["momentum"] == 0.7


def test_the_factor_is_of_the_full_rate_each_time() -> None:
    optimizer = make_optimizer(
        TrainingPlan(prompt_learning_rate=0.4, tail_learning_rate=0.2), *parts()
    )
    for factor in (0.5, 0.5, 1.0, 0.0, 0.25):
        set_progress(optimizer, factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * factor, 0.2 * factor])


def test_weight_decay_leaves_the_prompts_alone() -> None:
    prompts, tail = parts()
    training = TrainingPlan(optimizer="sgd", weight_decay=1.0, tail_learning_rate=0.1)
    optimizer = make_optimizer(training, prompts, tail)
    for parameter in (prompts, *tail.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    before = tail.weight.detach().clone()
    optimizer.step()
    assert torch.equal(prompts, torch.ones(2, 3))
    assert torch.allclose(tail.weight, before * 0.9)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_run_without_prompts(name: str) -> None:
    _, tail = parts()
    optimizer = make_optimizer(TrainingPlan(optimizer=name), None, tail)
    tail(torch.ones(1, 3)).sum().backward()
    optimizer.step()
