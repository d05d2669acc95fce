"""Means, tables, files and the page of a comparison."""

import csv
import io
import json
import re
import statistics
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from protocol.messages import BlobRef, ParticipantView, Results, RoundView, RunView
from protocol.plan import RunPlan
from protocol.traffic import Phase
from sfprompt_bench.compare.charts import accuracy_chart, device_chart, share_chart
from sfprompt_bench.compare.config import Comparison
from sfprompt_bench.compare.metrics import reference_figures, run_figures
from sfprompt_bench.compare.report import comparison_csv, comparison_json, report_html
from sfprompt_bench.compare.results import FIELDS, Outcome, bytes_to_target
from sfprompt_bench.compare.tables import cost_table, measured_over_calculated, result_table
from sfprompt_bench.compare.usage import Usage
from sfprompt_bench.cost.method_cost import Question
from sfprompt_bench.estimate.calculator import estimate
from sfprompt_bench.estimate.report import estimate_report
from sfprompt_bench.methods.base import ReferenceResult
from sfprompt_bench.methods.registry import METHODS
from sfprompt_bench.presets import preset_named
from tuning_methods.custom.settings import Custom

COMPARISON = Comparison(
    name="made by hand",
    methods=("sfprompt", "fl-full", "central"),
    seeds=(0, 1),
    target_accuracy=0.7,
)

BLOB = BlobRef(sha256="0" * 64, nbytes=1000)


def figures(accuracy: float, megabytes: int) -> dict[str, Any]:
    """Two rounds; half the bytes go up in split training, half come down with the head."""
    total = megabytes * 1_000_000
    return {
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "accuracy_clients": {"device-1": accuracy - 0.1, "device-2": accuracy + 0.1},
        "accuracy_worst_client": accuracy - 0.1,
        "trainable_parameters": 5000,
        "bytes_start": total // 2,
        "bytes_up_per_round": total // 4,
        "bytes_down_per_round": 0,
        "bytes_total": total,
        "bytes_all_devices": 2 * total,
        "bytes": {
            "smashed": {"up": total // 2, "down": 0},
            "download": {"up": 0, "down": total // 2},
            "inference": {"up": total, "down": total},
        },
        "device_flops_per_round": 10**9,
        "device_flops_total": 2 * 10**9,
        "device_peak_bytes": 400_000_000,
        "device_seconds": 4.0,
        "server_peak_bytes": 500_000_000,
        "server_seconds": 5.0,
        "seconds": 10.0,
        "curve": [
            {"round": 1, "bytes": total * 3 // 4, "accuracy": accuracy - 0.2},
            {"round": 2, "bytes": total, "accuracy": accuracy},
        ],
        # 4/5 of what was measured: 2/5 to start, 1/10 each way in each of the two rounds.
        "calculated": {
            "bytes_start": total * 2 // 5,
            "bytes_up_once": 0,
            "bytes_up_per_round": total // 10,
            "bytes_down_per_round": total // 10,
        },
    }


def measured(method: str, *by_seed: dict[str, Any]) -> Outcome:
    seeds = tuple(range(len(by_seed)))
    values = tuple(
        figures | {"bytes_to_target": bytes_to_target(figures, 0.7)} for figures in by_seed
    )
    return Outcome(method, f"what {method} is", {}, seeds, values)


SFPROMPT = measured("sfprompt", figures(0.80, 10), figures(0.90, 12))

FULL = measured("fl-full", figures(0.60, 900), figures(0.70, 900))

REFERENCE = reference_figures(ReferenceResult(0.95, 5000), 3.0)

CENTRAL = measured("central", REFERENCE, REFERENCE)

FAILED = Outcome("fedpeft-<b>", "breaks", failures=("seed 0: <script>alert(1)</script>",))

ALL_OUTCOMES = [SFPROMPT, FULL, CENTRAL, FAILED]


def test_means_and_spreads_are_over_the_seeds() -> None:
    assert SFPROMPT.mean("accuracy") == pytest.approx(0.85)
    assert SFPROMPT.spread("accuracy") == pytest.approx(statistics.stdev([0.8, 0.9]))
    assert SFPROMPT.mean("bytes_total") == 11_000_000
    assert measured("sfprompt", figures(0.8, 10)).spread("accuracy") == 0
    assert CENTRAL.mean("bytes_total") is None
    assert CENTRAL.spread("bytes_total") is None
    assert SFPROMPT.device_accuracies() == {
        "device-1": pytest.approx(0.75),
        "device-2": pytest.approx(0.95),
    }
    assert SFPROMPT.curve()[1] == {"round": 2, "bytes": 11_000_000, "accuracy": pytest.approx(0.85)}


def test_bytes_to_a_target_are_those_of_the_first_round_that_reaches_it() -> None:
    values = figures(0.80, 10)
    assert bytes_to_target(values, 0.60) == 7_500_000
    assert bytes_to_target(values, 0.70) == 10_000_000
    assert bytes_to_target(values, 0.90) is None
    assert bytes_to_target(values, None) is None
    assert SFPROMPT.mean("bytes_to_target") == pytest.approx((10_000_000 + 9_000_000) / 2)
    assert FULL.mean("bytes_to_target") is None  # one of its seeds never reaches it


def figures_of(settings: RunPlan) -> dict[str, Any]:
    """Two devices, two rounds. A state has 1,000 bytes, of which one crosses before round 1."""
    traffic = {
        str(Phase.DOWNLOAD): {"up": 200, "down": 9_800},
        str(Phase.SMASHED): {"up": 8_000, "down": 400},
        str(Phase.FEATURES): {"up": 0, "down": 4_000},
        str(Phase.UPDATES): {"up": 4_000, "down": 6_000},
        str(Phase.INFERENCE): {"up": 1_000, "down": 600},
        str(Phase.CONTROL): {"up": 100, "down": 100},
    }
    half = {
        phase: {way: number // 2 for way, number in counts.items()}
        for phase, counts in traffic.items()
    }
    members = tuple(
        ParticipantView(id=name, name=name, train_samples=10, test_samples=5, joined_at=0)
        for name in ("a", "b")
    )
    rounds = tuple(
        RoundView(
            round=number,
            attempt=1,
            status="closed",
            opened_at=0,
            sampled=("a", "b"),
            accuracy=accuracy,
            epsilon=float(number),
            traffic=half,
        )
        for number, accuracy in ((1, None), (2, 0.5))
    )
    run = RunView(
        id="r",
        status="finished",
        settings=Custom.of(settings),
        plan=settings,
        round=2,
        participants=2,
        created_at=0,
        backbone_bytes=1,
        head=BLOB,
        state=BLOB,
    )
    return run_figures(
        Results(run=run, rounds=rounds, participants=members, traffic=traffic),
        seconds=1.0,
        trainable_parameters=7,
        devices=[Usage(100, 2.0), Usage(300, 4.0)],
        server=Usage(500, 8.0),
        by_device={"a": 0.4, "b": 0.6},
    )


def test_the_figures_of_a_run_are_per_device_and_start_counts_once() -> None:
    result = figures_of(RunPlan())
    assert result["bytes_start"] == 10_000 // 2 + 1_000
    assert result["bytes_up_per_round"] == (8_000 + 4_000) // 4
    assert result["bytes_down_per_round"] == (400 + 4_000 + 6_000 - 2 * 1_000) // 4
    assert result["bytes_all_devices"] == 34_200
    assert result["bytes_total"] == 17_100
    assert result["bytes"]["features"] == {"up": 0, "down": 2_000}
    assert [point["bytes"] for point in result["curve"]] == [8_550, 17_100]
    assert [point["accuracy"] for point in result["curve"]] == [None, 0.5]
    assert (result["accuracy"], result["accuracy_worst_client"]) == (0.5, 0.4)
    assert (result["device_peak_bytes"], result["device_seconds"]) == (300, 3.0)
    assert (result["server_peak_bytes"], result["server_seconds"]) == (500, 8.0)
    assert result["epsilon"] == 2.0  # of both rounds


def test_a_head_that_came_again_belongs_to_the_rounds() -> None:
    settings = RunPlan.model_validate(
        {
            "model": {"mlp_widths": (8,) * 12, "tune": "lora"},
            "federation": {"rounds": 2},
            "method": {"distillation": {"epochs": 1, "every": 1}},
        }
    )
    plain, result = figures_of(RunPlan()), figures_of(settings)
    assert result["bytes_start"] == 10_000 // 2 // 2 + 1_000  # two heads for each of two devices
    assert result["bytes_down_per_round"] == plain["bytes_down_per_round"] + 5_000 // 4
    assert result["bytes_total"] == plain["bytes_total"]


def test_the_calculated_payload_has_every_head() -> None:
    values = figures(0.8, 10)
    assert measured_over_calculated(measured("fedpft", values)) == "1.25x"
    values["calculated"]["bytes_renewed"] = 10_000_000 // 5  # with it 5/5 of what was measured
    assert measured_over_calculated(measured("fedpft", values)) == "1.00x"


def test_a_reference_has_every_field_of_a_run() -> None:
    lacking = set(figures(0.5, 1)) - set(reference_figures(ReferenceResult(0.5, 1), 1.0))
    assert lacking == set()


def test_the_json_has_the_agreed_fields_for_every_method() -> None:
    values = json.loads(json.dumps(comparison_json(COMPARISON, ALL_OUTCOMES)))
    agreed = {
        "trainable_parameters",
        "bytes_start",
        "bytes_up_per_round",
        "bytes_down_per_round",
        "device_flops_per_round",
        "device_peak_bytes",
        "accuracy",
        "accuracy_worst_client",
        "bytes_total",
        "seconds",
    }
    for result in values["methods"].values():
        assert agreed <= set(result)
        assert set(result["spread"]) == set(FIELDS)
    assert values["methods"]["sfprompt"]["bytes_total"] == 11_000_000
    assert values["methods"]["central"]["bytes_total"] is None
    assert values["methods"]["fedpeft-<b>"]["failures"] == list(FAILED.failures)


def test_the_calculator_writes_its_methods_under_the_same_names_and_fields() -> None:
    settings = preset_named("digits").settings
    question = Question(settings.plan, train_samples=10)
    report = estimate_report(settings, question, estimate(question))
    values = json.loads(json.dumps(report))["methods"]
    for result in values.values():
        assert set(FIELDS[:6]) <= set(result)
    assert set(values) <= set(METHODS)


def test_each_point_of_a_sweep_has_methods_of_its_own() -> None:
    swept = COMPARISON.model_copy(update={"sweep": {"devices": (2, 4)}})
    few, many = (
        Outcome("sfprompt", "x", {"devices": number}, (0,), (figures(share, 1),))
        for number, share in ((2, 0.5), (4, 0.6))
    )
    values = comparison_json(swept, [few, many])
    assert [point["sweep"] for point in values["points"]] == [{"devices": 2}, {"devices": 4}]
    assert values["points"][1]["methods"]["sfprompt"]["accuracy"] == pytest.approx(0.6)
    assert values["methods"]["sfprompt"]["accuracy"] == pytest.approx(0.5)
    assert few.name == "sfprompt (devices = 2)"


def test_the_csv_has_a_row_for_each_method() -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(ALL_OUTCOMES))))
    assert [row["method"] for row in rows] == [outcome.method for outcome in ALL_OUTCOMES]
    assert float(rows[0]["accuracy"]) == pytest.approx(0.85)
    assert rows[0]["seeds"] == "0 1"
    assert rows[2]["bytes_total"] == ""
    assert rows[3]["failures"] == FAILED.failures[0]


def test_the_tables_fit_a_terminal_of_80_columns() -> None:
    long = measured("sfprompt-input-shallow", figures(0.8, 40_000), figures(0.9, 40_000))
    console = Console(width=80, record=True, file=io.StringIO())
    for table in (result_table([*ALL_OUTCOMES, long], "t", 0.7), cost_table([*ALL_OUTCOMES, long])):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"sfprompt +85\.0% ± 7\.1 +75\.0% ± 7\.1 +11\.00 +9\.50 +10", text)
    assert re.search(r"sfprompt-input-shallow +85", text)
    assert re.search(r"central +95\.0% ± 0\.0 +- +- ", text)
    assert re.search(r"fedpeft-<b> +failed", text)
    assert "1.25x" in text  # 10 MB where 8 are calculated, 12 where 9.6 are


def test_privacy_has_a_column_where_there_is_some() -> None:
    private = measured(
        "sfprompt", figures(0.8, 10) | {"epsilon": 2.0}, figures(0.9, 12) | {"epsilon": 3.0}
    )
    columns = [str(c.header) for c in result_table([private, CENTRAL, FAILED], "t", 0.7).columns]
    assert columns[-2:] == ["epsilon", "time"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result_table([private, CENTRAL, FAILED], "t", 0.7))
    text = console.export_text()
    assert re.search(r"sfprompt +85\.0% ± 7\.1 +75\.0% ± 7\.1 +11\.00 +9\.50 +2\.50 +10", text)
    assert "epsilon" not in [str(c.header) for c in result_table(ALL_OUTCOMES, "t", None).columns]
    values = comparison_json(COMPARISON, [private, CENTRAL])["methods"]
    assert (values["sfprompt"]["epsilon"], values["central"]["epsilon"]) == (2.5, None)


class Page(HTMLParser):
    """The elements of a page and the addresses in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pointed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = {"src", "href", "xlink:href", "data", "action"}
        self.pointed += [value or "" for name, value in attrs if name in named]


def test_the_report_needs_nothing_but_itself_and_runs_nothing() -> None:
    text = report_html(COMPARISON, ALL_OUTCOMES, 'name = "made by hand"')
    page = Page(text)
    assert page.tags.count("svg") == 4
    assert page.pointed == []
    assert "script" not in page.tags
    assert not re.search(r"https?:|url\(|@import", text)
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert text.index("Accuracy over bytes") < text.index("Accuracy over rounds")
    for shown in ("sfprompt", "fl-full", "85.0% ± 7.1", "what central is", "made by hand"):
        assert shown in text


def test_a_report_of_nothing_but_failures_is_a_report() -> None:
    page = Page(report_html(COMPARISON, [FAILED], ""))
    assert "svg" not in page.tags


def test_a_chart_puts_more_accuracy_higher_and_more_bytes_further_right() -> None:
    chart = accuracy_chart(
        {"a": [(1.0, 0.2), (10.0, 0.4), (100.0, 0.6)]},
        {"b": 0.9},
        {"a": 0, "b": 1},
        x_label="MB, one device",
        logarithmic=True,
    )
    assert chart is not None
    first, second, third = chart.lines[0].marks
    assert first.x < second.x < third.x
    assert second.x - first.x == pytest.approx(third.x - second.x)  # equal factors
    assert first.y > second.y > third.y > chart.levels[0].y
    for mark in chart.lines[0].marks:
        assert chart.left <= mark.x <= chart.right
        assert chart.top <= mark.y <= chart.bottom
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "5", "10", "20", "50", "100"]


def test_a_chart_of_one_point_is_drawn() -> None:
    chart = accuracy_chart({"a": [(3.0, 0.5)]}, {}, {"a": 0}, x_label="rounds", logarithmic=False)
    assert chart is not None
    assert len(chart.lines[0].marks) == 1


def test_shares_of_bytes_fill_the_row() -> None:
    chart = share_chart({"a": {"smashed": 1e6, "features": 3e6}, "b": {}}, {"a": 0, "b": 1})
    assert chart is not None
    (row,) = chart.rows
    one, other = row.marks
    assert one.x == pytest.approx(chart.left)
    assert other.width == pytest.approx(3 * one.width)
    assert other.x + other.width == pytest.approx(chart.right)
    assert row.total == "4.0 MB"


def test_devices_are_dots_in_the_order_of_their_accuracy() -> None:
    chart = device_chart({"a": {"one": 0.5, "two": 0.7}}, {"a": 0})
    assert chart is not None
    one, two = chart.rows[0].marks
    assert one.x < two.x
    assert chart.rows[0].total == "worst 50.0%"
