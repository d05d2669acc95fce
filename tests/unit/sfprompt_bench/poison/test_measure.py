"""Attacks on runs of the default form, on features that are easy to classify."""

from __future__ import annotations

import pytest
import torch

from protocol.settings import RunSettings
from sfprompt_bench.poison.data import PoisonData, Tokens
from sfprompt_bench.poison.measure import PoisonBench, PoisonResult, Rule
from split_model.backbone.architecture import anatomy
from split_model.parts.depths import read_tokens

CLASSES, DEVICES, EACH = 4, 5, 40

DEFAULT = Rule("fedavg")

PLAN = RunSettings.model_validate(
    {
        "model": {
            "backbone": "test_vit",
            "weights": "random:0",
            "image_size": 32,
            "num_classes": CLASSES,
        },
        "method": {"name": "sfprompt", "rank": 24},
    }
).plan


def tokens(count: int, seed: int) -> Tokens:
    width = read_tokens(PLAN.model) * anatomy(PLAN.model).width
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    plain = centres[labels] + 2 * torch.randn(count, width, generator=generator)
    patch = torch.randn(width, generator=torch.Generator().manual_seed(8))
    return Tokens(plain.half(), (plain + patch).half(), labels)


BENCH = PoisonBench(
    PLAN,
    PoisonData(
        tokens(DEVICES * EACH, 0), tokens(80, 1), torch.arange(DEVICES * EACH).chunk(DEVICES)
    ),
    rounds=2,
)


def run(attack: str | None, rule: Rule = DEFAULT, share: float = 0.2) -> PoisonResult:
    return BENCH.measure(rule, attack, share)


def test_honest_devices_are_never_refused_and_learn() -> None:
    result = run(None)
    assert (result.refused, result.refused_honest, result.hostile) == (0, 0, 0)
    assert min(result.start, result.last, result.best) > 0.95


@pytest.mark.parametrize("attack", ["huge", "noise", "sign-flip", "label-flip"])
def test_the_default_form_refuses_hostile_devices_in_every_round(attack: str) -> None:
    result = run(attack)
    assert (result.refused, result.refused_honest) == (1.0, 0)
    assert min(result.start, result.last) > 0.95


def test_flipped_labels_count_where_labels_are_not_compared() -> None:
    result = run("label-flip", Rule("fedavg", compares=False), 0.4)
    assert result.refused < 1
    assert result.last < run("label-flip", share=0.4).last


def test_the_same_seed_gives_the_same_result() -> None:
    assert run("noise") == run("noise")
