"""Attacks under aggregation rules, on features that are easy to classify."""

from __future__ import annotations

import pytest
import torch

from protocol.federation import AggregationRule
from protocol.plan import RunPlan
from sfprompt_bench.poison.attacks import BIAS, WEIGHT, Shard, train_honestly
from sfprompt_bench.poison.measure import PoisonData, PoisonResult, make_plan, measure
from tests.support.federation import SMALL

CLASSES, WIDTH, DEVICES, EACH = 10, 192, 5, 40


def data() -> PoisonData:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    patch = 3 * torch.randn(WIDTH, generator=generator)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % CLASSES
        return centres[labels] + 0.3 * torch.randn(count, WIDTH, generator=generator), labels

    shards = []
    for number in range(DEVICES):
        features, labels = draw(EACH)
        shards.append(Shard(features, features + patch, labels, number))
    test, labels = draw(100)
    return PoisonData(shards, test, test + patch, labels)


def run(
    rule: AggregationRule, attack: str | None, share: float = 0.2, *, bound: bool = True
) -> PoisonResult:
    plan = make_plan(RunPlan(model=SMALL), rule, bound=bound, rounds=2)
    return measure(plan, data(), attack, share)


def test_honest_devices_are_never_refused_and_learn() -> None:
    for rule in ("fedavg", "multi-krum"):
        result = run(rule, None)
        assert (result.refused, result.refused_honest, result.hostile) == (0, 0, 0)
        assert result.accuracy > 0.95


def test_huge_numbers_destroy_a_mean_without_the_bound_and_nothing_with_it() -> None:
    assert run("fedavg", "huge", bound=False).accuracy < 0.5
    result = run("fedavg", "huge")
    assert (result.refused, result.refused_honest) == (1.0, 0)
    assert result.accuracy > 0.95


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "multi-krum"])
@pytest.mark.parametrize("attack", ["noise", "sign-flip", "label-flip"])
def test_a_robust_rule_keeps_the_accuracy(rule: AggregationRule, attack: str) -> None:
    assert run(rule, attack).accuracy > 0.9


def test_a_backdoor_passes_the_mean() -> None:
    clean, poisoned = run("fedavg", None), run("fedavg", "backdoor", 0.4)
    assert poisoned.backdoor > clean.backdoor
    assert poisoned.accuracy > 0.9  # which is why accuracy alone does not show it
    assert run("multi-krum", "backdoor", 0.4).backdoor <= poisoned.backdoor


def test_the_same_seed_gives_the_same_result() -> None:
    assert run("krum", "noise") == run("krum", "noise")


def test_training_lowers_the_loss() -> None:
    state = {WEIGHT: torch.zeros(CLASSES, WIDTH), BIAS: torch.zeros(CLASSES)}
    shard = data().shards[0]
    tuned = train_honestly(state, shard)
    logits = shard.features @ tuned[WEIGHT].T + tuned[BIAS]
    assert torch.nn.functional.cross_entropy(logits, shard.labels) < 1.0
