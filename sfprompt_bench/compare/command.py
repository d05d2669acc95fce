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
from sfprompt_bench.compare.plan import with_methods
from sfprompt_bench.compare.report import comparison_csv, comparison_json, report_html
from sfprompt_bench.compare.results import Outcome
from sfprompt_bench.compare.runner import RESOLVED, run_comparison
from sfprompt_bench.compare.tables import cost_table, result_table
from sfprompt_bench.compare.trackers import (
    check_mlflow,
    check_tensorboard,
    log_mlflow,
    log_tensorboard,
)
from sfprompt_bench.methods.registry import METHODS
from sfprompt_bench.presets import JsonFile
from sfprompt_bench.run.preflight import make_run_folder


def compare(
    file: Annotated[
        Path | None,
        typer.Argument(help="TOML file with the comparison's settings; see docs/compare.md."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare this method instead of the file's; repeat the option for more. "
            f"{' | '.join(METHODS)}"
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="Use this seed instead of the file's; repeat the option for more."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Compare five methods on a few digits, in minutes; takes no file."
        ),
    ] = False,
    at_once: Annotated[
        int,
        typer.Option(min=1, help="Runs at the same time. More than one makes each run slower."),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results. Runs with a result there are not repeated. "
            "Default: runs/compare-NAME-TIME."
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Log each run for TensorBoard to this folder (extra: tensorboard)."),
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(help="Log each run to MLflow at this tracking URI (extra: mlflow)."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Run methods side by side and report accuracy, bytes, compute, memory and time."""
    console = Console()
    # Packages that are needed at the end are checked before any run starts.
    if tensorboard is not None:
        check_tensorboard()
    if mlflow is not None:
        check_mlflow()
    comparison = _comparison(file, quick, method, seed)
    folder = make_run_folder(out, f"compare-{comparison.name}")
    outcomes = run_comparison(comparison, folder, at_once, console)
    _show(comparison, outcomes, console)
    for path in _write(comparison, outcomes, folder, json_file):
        console.print(f"  {path}", highlight=False)
    if tensorboard is not None:
        log_tensorboard(outcomes, tensorboard)
    if mlflow is not None:
        log_mlflow(comparison, outcomes, mlflow)
    if any(outcome.failures for outcome in outcomes):
        raise typer.Exit(1)


def _comparison(
    file: Path | None, quick: bool, methods: list[str] | None, seeds: list[int] | None
) -> Comparison:
    """The file's comparison, or the quick one, with the methods and seeds of the command line."""
    if (file is None) != quick:
        raise InvalidField(
            "compare takes a file, or --quick",
            field="file",
            hint="docs/results/comparisons has example files",
        )
    comparison = QUICK if file is None else load_comparison(file)
    if methods:
        comparison = with_methods(comparison, methods)
    if seeds:
        comparison = parse_message(Comparison, comparison.model_dump() | {"seeds": seeds})
    return comparison


def _show(comparison: Comparison, outcomes: Sequence[Outcome], console: Console) -> None:
    points = comparison.points()
    for number, point in enumerate(points, start=1):
        at_point = [outcome for outcome in outcomes if outcome.point == point]
        title = f"{comparison.name}: {point_name(point)}" if point else comparison.name
        for table in (
            result_table(at_point, title, comparison.target_accuracy),
            cost_table(at_point),
        ):
            if number < len(points):
                table.caption = None  # all points have the same caption
            console.print(table)
    for outcome in outcomes:
        for failure in outcome.failures:
            console.print(f"[red]{outcome.name}[/red]")
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
