"""What an estimate says of one method against another, and of the paper's claims."""

import json
from io import StringIO

import pytest
from rich.console import Console

from protocol.federation import FederationSettings
from protocol.plan import ModelPlan, RunPlan
from sfprompt_bench.estimate import (
    METHODS,
    Headline,
    MethodCost,
    Question,
    estimate,
    estimate_report,
    estimate_table,
    headline,
    ratios,
)
from sfprompt_bench.estimate.headline import paper_settings

OTHERS = ("sfprompt-paper", "fl-full")


def moving(start: int, per_round: int, once: int = 0, flops: int = 1) -> MethodCost:
    return MethodCost(1, start, per_round, 0, flops, 1, bytes_up_once=once)


def against(own: MethodCost, prompt: MethodCost) -> dict[str, MethodCost]:
    return {"sfprompt": own, "fedpeft-prompt": prompt} | dict.fromkeys(OTHERS, moving(400, 100))


def test_ratios_are_of_whole_runs_with_their_start() -> None:
    costs = against(moving(10, 5, once=40, flops=3), moving(100, 20))
    costs["fl-full"] = moving(200, 80, flops=30)
    found = ratios(costs, 10)
    assert found.bytes_vs_paper == 100 / 1400
    assert found.bytes_vs_full == 100 / 1000
    assert found.bytes_vs_fedpeft_prompt == 100 / 300
    assert found.flops_vs_full == 3 / 30


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


@pytest.fixture(scope="module")
def question() -> Question:
    run = RunPlan(
        model=ModelPlan(backbone="vit_tiny_patch16_224", image_size=32, prompt_at="cut"),
        federation=FederationSettings(rounds=7),
    )
    return Question(run, 60, 20)


def test_a_table_has_a_row_for_every_method(question: Question) -> None:
    table = estimate_table(question, estimate(question))
    assert table.row_count == len(METHODS)
    console = Console(file=StringIO(), width=200)
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in shown for name in METHODS)
    assert "7 rounds" in shown


def test_a_report_survives_json(question: Question) -> None:
    costs = estimate(question)
    report = estimate_report(question, costs)
    assert json.loads(json.dumps(report)) == report
    assert RunPlan.model_validate(report["settings"]) == question.settings
    assert list(report["methods"]) == list(METHODS)
    for name, cost in costs.items():
        assert report["methods"][name]["bytes_total"] == cost.bytes_total(7)
        assert report["methods"][name]["device_peak_bytes"] == cost.device_peak_bytes


@pytest.fixture(scope="module")
def found() -> Headline:
    return headline()


def test_the_papers_traffic_is_that_of_some_hundred_samples_a_round(found: Headline) -> None:
    # 0.47 x 2|W| less prompts and norm + classifier both ways, over four tensors of 202 tokens.
    whole = 4 * 85_806_346
    small = 4 * (5 * 768 + 2 * 768 + 7690)
    visits = (0.47 * 2 * whole - 2 * small) / (4 * 202 * 768 * 4)
    fit = found.traffic[0]
    assert (fit.backbone, fit.tail_blocks) == ("vit_base_patch16_224", 0)
    assert fit.visits == pytest.approx(visits, rel=1e-9)
    assert 129 < visits < 131


def test_the_settings_found_give_the_claimed_traffic(found: Headline) -> None:
    for fit in found.traffic:
        run = paper_settings(fit.backbone, tail_blocks=fit.tail_blocks)
        question = Question(run, round(fit.visits))
        costs = {name: METHODS[name].cost(question) for name in ("fl-full", "sfprompt-paper")}
        share = costs["sfprompt-paper"].bytes_per_round / costs["fl-full"].bytes_per_round
        assert round(share, 2) == fit.claim


def test_both_claims_of_traffic_agree_only_with_a_block_in_the_tail(found: Headline) -> None:
    for tail_blocks, agree in ((0, False), (1, True)):
        fits = [fit for fit in found.traffic if fit.tail_blocks == tail_blocks]
        assert len(fits) == 2
        assert (max(fit.least for fit in fits) <= min(fit.most for fit in fits)) is agree


def test_the_papers_compute_needs_a_device_without_blocks(found: Headline) -> None:
    solved = [fit for fit in found.compute if fit.keep_fraction is not None]
    assert solved
    assert all(fit.cut == 0 and fit.tail_blocks == 0 for fit in solved)
    assert all(fit.floor > 0.05 for fit in found.compute if fit.cut or fit.tail_blocks)


def test_the_keep_fraction_found_gives_the_claimed_compute(found: Headline) -> None:
    for fit in found.compute:
        if fit.keep_fraction is None:
            continue
        run = paper_settings(
            "vit_base_patch16_224",
            local_epochs=fit.local_epochs,
            split_epochs=fit.split_epochs,
            keep_fraction=fit.keep_fraction,
        )
        question = Question(run, 10_000, local_epochs=fit.local_epochs)
        own = METHODS["sfprompt-paper"].cost(question).device_flops_per_round
        full = METHODS["fl-full"].cost(question).device_flops_per_round
        assert round(own / full, 4) == 0.0046
