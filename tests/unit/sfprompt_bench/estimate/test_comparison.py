"""Ratios between methods, and the table and JSON of an estimate."""

import json
from io import StringIO

import pytest
from rich.console import Console

from protocol.federation import FederationSettings
from protocol.parts import BackboneSettings
from protocol.settings import RunSettings
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.estimate.calculator import estimate, ratios
from sfprompt_bench.estimate.report import estimate_report, estimate_table
from sfprompt_bench.methods.registry import ESTIMATED

OTHERS = ("sfprompt-paper", "fl-full")


def moving(start: int, per_round: int, once: int = 0, flops: int = 1) -> MethodCost:
    return MethodCost(1, start, per_round, 0, flops, 1, bytes_up_once=once)


def against(own: MethodCost, prompt: MethodCost) -> dict[str, MethodCost]:
    return {"sfprompt": own, "fedpeft-prompt": prompt} | dict.fromkeys(OTHERS, moving(400, 100))


def test_ratios_are_of_whole_runs_with_their_start() -> None:
    costs = against(moving(10, 5, once=40, flops=3), moving(100, 20))
    costs["fl-full"] = moving(200, 80, flops=30)
    shares = ratios(costs, 10)
    assert shares.bytes_vs_paper == 100 / 1400
    assert shares.bytes_vs_full == 100 / 1000
    assert shares.bytes_vs_fedpeft_prompt == 100 / 300
    assert shares.flops_vs_full == 3 / 30


def test_both_have_moved_as_much_when_they_break_even() -> None:
    own, prompt = moving(10, 7, once=30), moving(100, 2)
    assert ratios(against(own, prompt), 1).break_even_rounds == 12
    assert own.bytes_total(12) == prompt.bytes_total(12)


def test_evaluations_count_for_breaking_even() -> None:
    own = MethodCost(1, 0, 2, 0, 1, 1, bytes_down_per_evaluation=6, evaluate_every=2)
    prompt = moving(80, 1)
    assert ratios(against(own, prompt), 1).break_even_rounds == 20
    assert own.bytes_total(20) == prompt.bytes_total(20)


@pytest.mark.parametrize(
    ("own", "prompt"),
    [
        (moving(10, 2), moving(100, 2)),  # the same every round
        (moving(10, 1), moving(100, 2)),  # less at the start and in every round
        (moving(200, 3), moving(100, 2)),  # more in both
    ],
)
def test_some_never_break_even(own: MethodCost, prompt: MethodCost) -> None:
    assert ratios(against(own, prompt), 1).break_even_rounds is None


SETTINGS = RunSettings(
    model=BackboneSettings(backbone="vit_tiny_patch16_224", image_size=32),
    federation=FederationSettings(rounds=7),
)


@pytest.fixture(scope="module")
def question() -> Question:
    return Question(SETTINGS.plan, 60, 20)


def test_a_table_has_a_row_for_every_method(question: Question) -> None:
    table = estimate_table(question, estimate(question))
    assert table.row_count == len(ESTIMATED)
    console = Console(file=StringIO(), width=200)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in text for name in ESTIMATED)
    assert "7 rounds" in text


def test_a_report_survives_json(question: Question) -> None:
    costs = estimate(question)
    report = estimate_report(SETTINGS, question, costs)
    assert json.loads(json.dumps(report)) == report
    assert RunSettings.model_validate(report["settings"]) == SETTINGS
    assert list(report["methods"]) == list(ESTIMATED)
    for name, cost in costs.items():
        assert report["methods"][name]["bytes_total"] == cost.bytes_total(7)
        assert report["methods"][name]["device_peak_bytes"] == cost.device_peak_bytes
