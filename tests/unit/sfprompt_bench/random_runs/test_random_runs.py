"""Random settings of a run, their findings, and one such run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfprompt_bench.random_runs.draws import Draw, data_of, draw
from sfprompt_bench.random_runs.measure import RandomRun, majority_accuracy, perform
from sfprompt_bench.random_runs.node import running_node
from sfprompt_bench.random_runs.report import append_row, summary_line

DRAWN = draw(0)

SMALL = {"backbone": "test_vit", "weights": "random:0"}

PATCH = 16  # pixels of that backbone's patches


def test_settings_are_repeated_by_their_number_and_differ_between_numbers() -> None:
    assert draw(7) == draw(7)
    drawn = [draw(number) for number in range(200)]
    assert {d.source for d in drawn} == {"synthetic", "digits", "fashion-mnist"}
    assert {d.devices for d in drawn} == set(range(1, 9))
    assert min(d.classes for d in drawn) == 2
    assert max(d.classes for d in drawn) == 20
    assert {d.image_size for d in drawn} == set(range(28, 113, 14))
    assert all(d.devices <= d.images and d.test_images >= 20 for d in drawn)


@pytest.mark.parametrize("source", ["synthetic", "digits"])
def test_the_devices_share_the_training_images_and_the_first_has_the_test_images(
    source: str,
) -> None:
    drawn = next(d for d in map(draw, range(100)) if d.source == source and d.devices > 2)
    parts = data_of(drawn)
    assert len(parts) == drawn.devices
    assert sum(len(part.train) for part in parts) <= drawn.images
    assert [len(part.test) > 0 for part in parts] == [True] + [False] * (drawn.devices - 1)
    assert all(len(part.class_names) == drawn.classes for part in parts)
    again = data_of(drawn)
    assert np.array_equal(parts[1].train.labels, again[1].train.labels)
    assert np.array_equal(parts[1].train.image(0), again[1].train.image(0))


def test_the_majority_is_that_of_the_training_images() -> None:
    drawn = next(d for d in map(draw, range(100)) if d.source == "digits" and d.devices > 1)
    parts = data_of(drawn)
    labels = np.concatenate([part.train.labels for part in parts])
    most = int(np.bincount(labels).argmax())
    expected = float((parts[0].test.labels == most).mean())
    assert majority_accuracy(parts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("end", "majority", "count"), [(0.8, 0.1, 0), (0.71, 0.1, 0), (0.6, 0.1, 1), (0.3, 0.5, 2)]
)
def test_a_run_that_ends_far_below_its_start_or_the_majority_is_a_finding(
    end: float, majority: float, count: int
) -> None:
    drawn = Draw(0, "digits", 10, 1, 100, 120, "iid", 28, 1.0, 0.0, 2)
    assert len(RandomRun(drawn, 0.75, end, majority).findings) == count


def test_a_failed_run_is_a_finding_and_counts(tmp_path: Path) -> None:
    runs = [RandomRun(DRAWN, error="no"), RandomRun(DRAWN, 0.5, 0.6, 0.1)]
    assert runs[0].findings == ("failed: no",)
    assert summary_line(runs).startswith("2 runs: 1 failed, 0 end below")
    for run in runs:
        append_row(tmp_path / "runs.csv", run)
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[1].endswith(",failed: no")


def test_a_random_run_ends_no_lower_than_it_starts(tmp_path: Path) -> None:
    with running_node(tmp_path) as node:
        run = perform(node, draw(1, patch=PATCH, tokens=2000), SMALL)
    assert run.findings == ()
    assert run.drawn.number == 1
