"""Cells, verdicts, uneven sets and files of ``sfprompt-bench dominate``."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edge_client.data.partition import partition
from edge_client.data.sources import load_dataset
from protocol.errors import NotFound
from sfprompt_bench.cli import app
from sfprompt_bench.compare.results import Outcome
from sfprompt_bench.dominate.cells import CELLS, Cell, cells_named
from sfprompt_bench.dominate.chart import dots_of, draw
from sfprompt_bench.dominate.measure import METHODS, Selection, missing_jobs, plan_cells
from sfprompt_bench.dominate.report import count_line, scores_csv, verdict_rows
from sfprompt_bench.dominate.timing import describe_seconds, estimated_seconds
from sfprompt_bench.dominate.uneven_sets import class_sizes, write_set
from sfprompt_bench.dominate.verdicts import Verdict, verdict_of

CELL = Cell("digits", 60)

TEST_IMAGES = 100


def outcome(method: str, *accuracies: float, nbytes: int | None = None, **more: Any) -> Outcome:
    """One seed for each accuracy; the best measured round is five points above the last."""
    figures = [
        {"accuracy": a, "best_accuracy": a + 0.05, "bytes_total": nbytes, "seconds": 1.0, **more}
        for a in accuracies
    ]
    return Outcome(method, "", {}, tuple(range(len(accuracies))), tuple(figures))


def verdict(*outcomes: Outcome) -> Verdict:
    return verdict_of(CELL, outcomes, TEST_IMAGES)


def test_another_method_counts_with_its_best_round_and_the_default_form_with_its_last() -> None:
    result = verdict(outcome("sfprompt", 0.80, 0.82), outcome("fl-full", 0.80, 0.82))
    other = result.best()
    assert other is not None
    assert result.difference(other) == pytest.approx(-0.05)


def test_the_difference_is_in_units_of_the_pooled_standard_deviation() -> None:
    ours, others = (0.80, 0.84, 0.85), (0.70, 0.71, 0.75)
    result = verdict(outcome("sfprompt", *ours), outcome("fl-full", *others))
    other = result.best()
    assert other is not None
    pooled = math.sqrt((statistics.variance(ours) + statistics.variance(others)) / 2)
    difference = statistics.fmean(ours) - statistics.fmean(others) - 0.05
    assert result.in_deviations(other) == pytest.approx(difference / pooled)


@pytest.mark.parametrize(
    ("shift", "word"), [(0.10, "first"), (0.051, "tied"), (0.049, "tied"), (0.0, "behind")]
)
def test_within_one_deviation_the_two_are_tied(shift: float, word: str) -> None:
    ours = [accuracy + shift for accuracy in (0.70, 0.71, 0.72)]
    result = verdict(outcome("sfprompt", *ours), outcome("fl-full", 0.70, 0.71, 0.72))
    other = result.best()
    assert other is not None
    assert result.word(other) == word


def test_one_seed_has_the_deviation_of_a_share_of_the_test_images() -> None:
    (score,) = verdict(outcome("sfprompt", 0.8)).scores
    assert score.deviation == pytest.approx(math.sqrt(0.8 * 0.2 / TEST_IMAGES))


def test_only_seeds_of_both_methods_are_compared() -> None:
    result = verdict(outcome("sfprompt", 0.80, 0.60, 0.10), outcome("fl-full", 0.75, 0.55))
    other = result.best()
    assert other is not None
    assert result.difference(other) == pytest.approx(0.0)


def test_a_reference_on_pooled_data_is_no_federated_rival() -> None:
    result = verdict(
        outcome("sfprompt", 0.8), outcome("ridge-depths", 0.9), outcome("fl-full", 0.7)
    )
    assert [best.method for pooled in (True, False) if (best := result.best(pooled=pooled))] == [
        "ridge-depths",
        "fl-full",
    ]
    assert count_line([result]) == (
        "against all others: 0 first, 0 tied, 1 behind of 1 cells; against federated methods: "
        "1 first, 0 tied, 0 behind of 1 cells"
    )


def test_cells_in_which_another_method_wins_come_first_in_the_table() -> None:
    wins = verdict_of(Cell("digits", 240), [outcome("sfprompt", 0.9), outcome("fl-full", 0.5)], 100)
    loses = verdict(outcome("sfprompt", 0.5), outcome("fl-full", 0.9))
    rows = verdict_rows([wins, loses], pooled=True)
    assert [(row[0], row[-1]) for row in rows] == [("digits-60", "behind"), ("digits-240", "first")]


def test_the_csv_file_has_a_row_for_each_method_and_no_difference_to_itself() -> None:
    result = verdict(outcome("sfprompt", 0.8, nbytes=2_500_000), outcome("fl-full", 0.7))
    rows = list(csv.DictReader(io.StringIO(scores_csv([result]))))
    assert [(row["method"], row["bytes"], row["default_minus_this"]) for row in rows] == [
        ("sfprompt", "2500000", ""),
        ("fl-full", "", "0.0500"),
    ]


def test_a_dot_is_a_methods_lead_over_the_default_form(tmp_path: Path) -> None:
    result = verdict(
        outcome("sfprompt", 0.8, nbytes=2_000_000),
        outcome("fl-full", 0.7, nbytes=80_000_000),
        outcome("ridge-depths", 0.8),
    )
    dots = {dot.method: dot for dot in dots_of([result])}
    assert dots["fl-full"].points == pytest.approx((-5.0,))
    assert dots["fl-full"].megabytes == pytest.approx(80)
    assert dots["ridge-depths"].megabytes is None
    with Image.open(draw([result], tmp_path / "plot.png")) as image:
        assert image.width == 780  # twice the width of a telephone


def test_every_cell_and_method_is_planned_and_none_has_a_result_yet(tmp_path: Path) -> None:
    selection = Selection(CELLS, METHODS, (0,))
    jobs = plan_cells(selection, tmp_path)
    assert {len(of_cell) for of_cell in jobs.values()} == {len(METHODS)}
    missing = missing_jobs(jobs)
    by_method = {name: sum(job.method.name == name for job in missing) for name in METHODS}
    # A partition has no effect on pooled data: dirichlet shares its references with IID.
    assert by_method["sfprompt"] == len(CELLS) == 17
    assert by_method["ridge-depths"] == by_method["central"] == 15
    assert estimated_seconds(missing, 600) > 3600


def test_a_device_has_one_class_in_the_cell_of_that_name() -> None:
    cell = Cell("digits", 600, "one-class")
    labels = np.repeat(np.arange(10), cell.shots or 0)
    assert len(labels) == cell.images
    parts = partition(labels, cell.devices, cell.partition, seed=1)
    assert [len(set(labels[part].tolist())) for part in parts] == [1] * 10


@pytest.mark.parametrize(("kind", "special"), [("majority", 450), ("rare", 5)])
def test_an_uneven_set_has_a_class_of_most_images_or_of_five(
    kind: Any, special: int, tmp_path: Path
) -> None:
    cell = Cell("digits", 600, kind)
    sizes = class_sizes(cell, 3)
    assert (sizes[3], sum(sizes)) == (special, 600)
    rest = sizes[:3] + sizes[4:]
    assert max(rest) - min(rest) <= 1
    small = Cell("digits", 100, kind)
    place = write_set(tmp_path, small, 5, test_images=30)
    data = load_dataset(f"folder:{place}", seed=0)
    assert sorted(data.train.class_counts().tolist()) == sorted(class_sizes(small, 0))
    assert len(data.test) == 30
    # Written without loss: every picture is one of the digits.
    whole = load_dataset("digits", seed=5).train
    known = {whole.image(number).tobytes() for number in range(len(whole))}
    assert all(data.train.image(n).tobytes() in known for n in range(len(data.train)))


def test_cells_are_chosen_by_pattern_and_an_unknown_one_is_named() -> None:
    names = [cell.name for cell in cells_named(["digits-*-rare", "digits-60"])]
    assert names == ["digits-60", "digits-600-rare"]
    with pytest.raises(NotFound, match="digits-61"):
        cells_named(["digits-61"])


def test_a_folder_without_results_is_reported_without_a_run(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "d.json"
    words = ["dominate", "--report", "--cells", "digits-60", "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["cells"] == []
    assert sorted(path.name for path in out.glob("dominate.*")) == [
        "dominate.csv",
        "dominate.json",
        "dominate.md",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "10 s"), (62, "60 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_are_rounded_for_people(seconds: float, words: str) -> None:
    assert describe_seconds(seconds) == words
