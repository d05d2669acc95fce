"""Measure the cells through `compare`, whose tasks have a result each and are not repeated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from protocol.messages import parse_message
from sfprompt_bench.compare.config import Comparison
from sfprompt_bench.compare.plan import Job, plan
from sfprompt_bench.compare.results import outcomes_of
from sfprompt_bench.compare.runner import TASK_FILE, perform_jobs
from sfprompt_bench.compare.tasks import Failure, Figures, read_figures
from sfprompt_bench.dominate.cells import Cell
from sfprompt_bench.dominate.uneven_sets import CLASS_NAMES, set_folder, write_set
from sfprompt_bench.dominate.verdicts import DEFAULT, Verdict, verdict_of

# Methods in a table's order. `central` tunes prompts, which the default form by itself has not.
METHODS = (
    DEFAULT,
    "fed3r",
    "fl-full",
    "fedpeft-head",
    "fedpeft-bias",
    "fedpeft-adapter",
    "fedpeft-prompt",
    "splitfed-full",
    "central",
    "linear-probe",
    "ridge-probe",
    "lda-probe",
    "ridge-depths",
    "lda-depths",
)

QUICK_METHODS = (DEFAULT, "fed3r", "linear-probe", "ridge-depths", "lda-depths")

TEST_IMAGES, QUICK_TEST_IMAGES = 600, 200

_DIGITS_TEST = 359  # a fifth of them

_ROUNDS = 8  # of the default form

_EVALUATIONS = 3  # of a method with gradients, about: its best round counts

_MODEL = {"backbone": "vit_small_patch14_dinov2", "weights": "packaged", "image_size": 42}

_CENTRAL = {"central": {"method": {"depths": 0}}}

_PATIENCE_S = 3600


@dataclass(frozen=True)
class Selection:
    """What to measure.

    Attributes:
        cells: in the order of the table.
        methods: likewise; `METHODS` has all.
        seeds: of each cell.
        test_images: at most.
    """

    cells: Sequence[Cell]
    methods: Sequence[str]
    seeds: Sequence[int]
    test_images: int = TEST_IMAGES

    def tests(self, cell: Cell) -> int:
        """The number of a cell's test images."""
        return min(self.test_images, _DIGITS_TEST if cell.data == "digits" else self.test_images)


def plan_cells(selection: Selection, folder: Path) -> dict[Cell, list[Job]]:
    """Plan the runs of all cells. Raises as `plan` does."""
    return {
        cell: [
            job
            for comparison in _comparisons(selection, cell, folder)
            for job in plan(comparison, folder)
        ]
        for cell in selection.cells
    }


def missing_jobs(jobs: Mapping[Cell, Sequence[Job]]) -> list[Job]:
    """The jobs without a result, each task once."""
    by_key = {job.task.key: job for of_cell in jobs.values() for job in of_cell}
    return [job for job in by_key.values() if read_figures(job.task, TASK_FILE) is None]


def measure_cells(
    selection: Selection,
    jobs: Mapping[Cell, Sequence[Job]],
    folder: Path,
    at_once: int,
    console: Console,
) -> list[Verdict]:
    """Perform the runs without a result, and judge each cell."""
    for cell in selection.cells:
        if cell.is_uneven_set:
            for seed in selection.seeds:
                write_set(folder, cell, seed, selection.tests(cell))
    results = perform_jobs([job for of_cell in jobs.values() for job in of_cell], at_once, console)
    return _judge(selection, jobs, results)


def read_cells(selection: Selection, jobs: Mapping[Cell, Sequence[Job]]) -> list[Verdict]:
    """Judge each cell by the results that exist; cells without any are left out."""
    tasks = {job.task.key: job.task for of_cell in jobs.values() for job in of_cell}
    results = {
        key: figures
        for key, task in tasks.items()
        if (figures := read_figures(task, TASK_FILE)) is not None
    }
    known = {
        cell: [job for job in of_cell if job.task.key in results] for cell, of_cell in jobs.items()
    }
    return _judge(selection, {cell: found for cell, found in known.items() if found}, results)


def _judge(
    selection: Selection,
    jobs: Mapping[Cell, Sequence[Job]],
    results: Mapping[str, Figures | Failure],
) -> list[Verdict]:
    return [
        verdict_of(cell, outcomes_of(of_cell, results, None), selection.tests(cell))
        for cell, of_cell in jobs.items()
    ]


def _comparisons(selection: Selection, cell: Cell, folder: Path) -> Iterator[Comparison]:
    """The default form with its own rounds, and the others with theirs."""
    others = [method for method in selection.methods if method != DEFAULT]
    groups = [([DEFAULT], _ROUNDS)] if DEFAULT in selection.methods else []
    groups += [(others, cell.rival_rounds)] if others else []
    for methods, rounds in groups:
        evaluate_every = rounds if methods == [DEFAULT] else max(1, rounds // _EVALUATIONS)
        shared: dict[str, Any] = {
            "name": cell.name,
            "devices": cell.devices,
            "partition": cell.partition,
            "methods": methods,
            "rounds": rounds,
            "model": _MODEL,
            "federation": {"evaluate_every": evaluate_every, "round_timeout_s": _PATIENCE_S},
            "overrides": {name: _CENTRAL[name] for name in methods if name in _CENTRAL},
        }
        for data in _data(selection, cell, folder):
            yield parse_message(Comparison, shared | data)


def _data(selection: Selection, cell: Cell, folder: Path) -> Iterator[dict[str, Any]]:
    """A cell's data, for all seeds or for each."""
    if cell.is_uneven_set:
        for seed in selection.seeds:
            place = set_folder(folder, cell, seed)
            yield {"data": f"folder:{place}", "class_names": CLASS_NAMES, "seeds": [seed]}
        return
    size = {"limit_train": cell.images} if cell.shots is None else {"shots": cell.shots}
    tests = selection.tests(cell)
    yield {"data": cell.data, "seeds": list(selection.seeds), "limit_test": tests, **size}
