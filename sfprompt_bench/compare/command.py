"""The command ``sfprompt-bench compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol.errors import InvalidField
from protocol.messages import parse_message
from sfprompt_bench.compare.config import QUICK, Comparison, load_comparison, point_name
from sfprompt_bench.compare.methods import METHODS
from sfprompt_bench.compare.report import (
    comparison_csv,
    comparison_json,
    cost_table,
    report_html,
    result_table,
)
from sfprompt_bench.compare.results import Outcome
from sfprompt_bench.compare.runner import RESOLVED, run_comparison
from sfprompt_bench.compare.trackers import (
    check_mlflow,
    check_tensorboard,
    log_mlflow,
    log_tensorboard,
)
from sfprompt_bench.presets import JsonFile
from sfprompt_bench.run.preflight import run_folder


def compare(
    file: Annotated[
        Path | None, typer.Argument(help="TOML file of the comparison; see docs/compare.md.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Again for more; in place of the file's. {' | '.join(METHODS)}"),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Again for more; in place of the file's.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few digits and rounds, in minutes; takes no file.")
    ] = False,
    at_once: Annotated[
        int, typer.Option(min=1, help="Tasks at a time; times are those of a busy machine then.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; tasks found done there are not repeated. Default: a new one."),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Log for TensorBoard here (extra: tensorboard).")
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option(help="Log to MLflow at this tracking URI (extra: mlflow).")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Run every method side by side: accuracy, bytes, compute, memory, time; one report."""
    console = Console()
    _check(tensorboard is not None, mlflow is not None)
    comparison = _chosen(file, quick, method, seed)
    folder = run_folder(out, f"compare-{comparison.name}")
    outcomes = run_comparison(comparison, folder, at_once, console)
    _show(comparison, outcomes, console)
    for path in _write(comparison, outcomes, folder, json_file):
        console.print(f"  {path}", highlight=False)
    if tensorboard is not None:
        log_tensorboard(outcomes, tensorboard)
    if mlflow is not None:
        log_mlflow(comparison, outcomes, mlflow)
    if any(one.failures for one in outcomes):
        raise typer.Exit(1)


def _check(tensorboard: bool, mlflow: bool) -> None:
    """What is needed at the end is looked for before anything is begun."""
    if tensorboard:
        check_tensorboard()
    if mlflow:
        check_mlflow()


def _chosen(
    file: Path | None, quick: bool, methods: list[str] | None, seeds: list[int] | None
) -> Comparison:
    """The file's comparison, or the quick one, with what the command line changes."""
    if (file is None) != quick:
        raise InvalidField(
            "compare takes a file, or --quick",
            field="file",
            hint="docs/results/comparisons has files to begin with",
        )
    comparison = QUICK if file is None else load_comparison(file)
    values = comparison.model_dump()
    if methods:
        values["methods"] = methods
        kept = comparison.overrides.items()
        values["overrides"] = {name: parts for name, parts in kept if name in methods}
    if seeds:
        values["seeds"] = seeds
    return parse_message(Comparison, values)


def _show(comparison: Comparison, outcomes: Sequence[Outcome], console: Console) -> None:
    points = comparison.points()
    for number, point in enumerate(points, start=1):
        here = [one for one in outcomes if one.point == point]
        title = f"{comparison.name}: {point_name(point)}" if point else comparison.name
        for table in (
            result_table(here, title, comparison.target_accuracy),
            cost_table(here),
        ):
            if number < len(points):
                table.caption = None  # it is the same below every point
            console.print(table)
    for one in outcomes:
        for failure in one.failures:
            console.print(f"[red]{one.name}[/red]")
            console.print(failure, markup=False, highlight=False)


def _write(
    comparison: Comparison, outcomes: Sequence[Outcome], folder: Path, json_file: Path | None
) -> list[Path]:
    resolved = folder / RESOLVED
    page, table, figures = (folder / f"comparison.{kind}" for kind in ("html", "csv", "json"))
    page.write_text(report_html(comparison, outcomes, resolved.read_text()))
    table.write_text(comparison_csv(outcomes))
    text = json.dumps(comparison_json(comparison, outcomes), indent=2) + "\n"
    figures.write_text(text)
    if json_file is not None:
        json_file.write_text(text)
    return [page, table, figures, resolved]
