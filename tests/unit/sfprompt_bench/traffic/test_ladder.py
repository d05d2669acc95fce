"""The ladder of traffic: its rungs, figures, tables and plot."""

import io
import itertools
import json
from pathlib import Path

import pytest
from rich.console import Console

from protocol.errors import NotFound
from protocol.presets import FORMS
from protocol.traffic import Phase
from sfprompt_bench.presets import preset_named, traffic_preset, with_changes
from sfprompt_bench.traffic.ladder import LadderSetting, RungResult, ladder
from sfprompt_bench.traffic.report import (
    large_table,
    phase_table,
    plot_ladder,
    traffic_figures,
    traffic_table,
)

PAPER, DEFAULT = (traffic_preset(form, quick=False) for form in ("paper", "default"))

RUNGS = ladder(PAPER.settings, DEFAULT.settings)

SETTING = LadderSetting(DEFAULT, devices=4, seeds=(0, 1, 2), link="20mbit,50ms", at_once=1)


def results() -> list[RungResult]:
    """400 MB on the first rung, a tenth of that on each of the others."""
    rungs = []
    for number, rung in enumerate(RUNGS):
        total = 400_000_000 if number == 0 else 40_000_000
        rungs.append(
            RungResult(
                rung,
                accuracy=(0.80, 0.81, 0.82) if number == 0 else (0.83, 0.84, 0.85),
                seconds=(60.0, 70.0, 80.0),
                bytes_total=(total,) * 3,
                traffic={str(phase): {"up": total // 20, "down": total // 20} for phase in Phase},
            )
        )
    return rungs


def test_the_ladder_goes_from_the_papers_form_to_the_default_one() -> None:
    assert RUNGS[0].settings == PAPER.settings
    assert RUNGS[-1].settings == DEFAULT.settings
    for lower, upper in itertools.pairwise(RUNGS):
        assert lower.settings != upper.settings
    assert len({rung.name for rung in RUNGS}) == len(RUNGS)


def test_every_measure_has_a_rung_of_its_own() -> None:
    names = [rung.name for rung in RUNGS]
    assert names == [
        "paper",
        "bfloat16",
        "lean features",
        "at the cut",
        "kept",
        "coded smashed",
        "coded steps",
        "coded states",
        "fewer samples",
        "closed form",
    ]
    assert RUNGS[-1].what.endswith("the default form")


def test_a_measure_that_a_form_leaves_out_has_no_rung() -> None:
    paper, default = (traffic_preset(form, quick=True).settings for form in ("paper", "default"))
    default = with_changes(default, {"method": {"keep_fraction": 1.0}})
    rungs = ladder(paper, default)
    assert rungs[-1].settings == default, "all samples"
    assert len(rungs) == len(RUNGS) - 1
    for lower, upper in itertools.pairwise(rungs):
        assert lower.settings != upper.settings


def test_the_papers_form_has_none_of_the_measures() -> None:
    wire, model = PAPER.settings.plan.wire, PAPER.settings.plan.model
    assert {wire.smashed, wire.features, wire.gradients, wire.updates, wire.head} == {"float32"}
    assert [wire.keep_smashed, wire.pooled_features, wire.update_deltas] == [False] * 3
    assert (model.prompt_at, model.prompt_depth) == ("input", "shallow")


def test_both_forms_are_of_one_backbone_on_the_same_data() -> None:
    for data in ("digits", "fashion-mnist"):
        paper, default = (preset_named(data, form) for form in ("paper", "default"))
        for field in ("backbone", "image_size", "cut", "num_classes"):
            one, other = paper.settings.plan.model, default.settings.plan.model
            assert getattr(one, field) == getattr(other, field)
        assert paper.settings.federation == default.settings.federation
        assert (paper.limit_train, paper.limit_test) == (default.limit_train, default.limit_test)


def test_an_unknown_form_is_refused_with_those_there_are() -> None:
    with pytest.raises(NotFound) as caught:
        preset_named("digits", "fast")
    assert caught.value.limit == list(FORMS)


def test_ratios_are_worked_out_per_device_with_the_start_on_both_sides() -> None:
    figures = traffic_figures(results(), SETTING)
    ratios = figures["ratios"]
    assert ratios["bytes_vs_paper"] == pytest.approx(0.1)
    assert ratios["accuracy_drop_points"] == pytest.approx(-3.0)
    # The whole model down at the start and, in 10 rounds, down and up again: 21 times its bytes.
    # 22.06 million numbers less the position table's for 37 x 37 patches, plus that for 3 x 3.
    model = 22_056_576 - 1370 * 384 + 10 * 384 + 384 * 10 + 10
    assert ratios["bytes_vs_full"] == pytest.approx(10e6 / (21 * 4 * model), rel=1e-3)
    assert 0 < ratios["bytes_vs_fedpeft_prompt"] < 0.2
    assert 0 < ratios["flops_vs_full"] < 1e-3


def test_a_line_is_waited_for_by_bytes_and_by_steps() -> None:
    first, *_, prompted, last = traffic_figures(results(), SETTING)["rungs"]
    nbytes = sum(sum(ways.values()) for ways in first["bytes"].values()) / 4
    steps = 2 * 10 * 188  # two requests for each of 750 samples in fours, in 10 rounds
    assert first["seconds_on_the_line"] == pytest.approx(8 * nbytes / 20e6 + 0.05 * steps)
    nbytes = sum(sum(ways.values()) for ways in prompted["bytes"].values()) / 4
    steps = 10 * 150  # one for each of 1,200 in eights
    assert prompted["seconds_on_the_line"] == pytest.approx(8 * nbytes / 20e6 + 0.05 * steps)
    nbytes = sum(sum(ways.values()) for ways in last["bytes"].values()) / 4
    assert last["seconds_on_the_line"] == pytest.approx(8 * nbytes / 20e6), "no step"


def test_the_figures_are_json_and_hold_every_rung() -> None:
    figures = json.loads(json.dumps(traffic_figures(results(), SETTING)))
    assert [rung["name"] for rung in figures["rungs"]] == [rung.name for rung in RUNGS]
    assert set(figures["vit_base_224"]) >= {"bytes_vs_paper", "bytes_vs_full", "flops_vs_full"}
    for rung in figures["rungs"]:
        assert rung["device_flops"] > 0


def test_the_tables_fit_a_terminal_of_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    rungs = results()
    for table in (
        phase_table(rungs, SETTING),
        traffic_table(rungs, SETTING),
        large_table(DEFAULT.settings),
    ):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert "100.00 │  100.00% │ 81.0% ± 1.0" in text
    assert "10.00 │   10.00% │ 84.0% ± 1.0" in text


def test_the_plot_is_written(tmp_path: Path) -> None:
    out = plot_ladder(results(), SETTING, tmp_path / "traffic.png")
    assert out.read_bytes().startswith(b"\x89PNG")
