"""Read a comparison, run its methods, and show and write the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

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
from sfprompt_bench.run.preflight import make_run_folder


def compare_methods(
    comparison: Comparison,
    at_once: int,
    out: Path | None,
    tensorboard: Path | None,
    mlflow: str | None,
    json_file: Path | None,
) -> bool:
    """Run a comparison with the options of the command; return whether a run failed."""
    console = Console()
    # Packages that are needed at the end are checked before any run starts.
    if tensorboard is not None:
        check_tensorboard()
    if mlflow is not None:
        check_mlflow()
    folder = make_run_folder(out, f"compare-{comparison.name}")
    outcomes = run_comparison(comparison, folder, at_once, console)
    _show(comparison, outcomes, console)
    for path in _write(comparison, outcomes, folder, json_file):
        console.print(f"  {path}", highlight=False)
    if tensorboard is not None:
        log_tensorboard(outcomes, tensorboard)
    if mlflow is not None:
        log_mlflow(comparison, outcomes, mlflow)
    return any(outcome.failures for outcome in outcomes)


def read_comparison(
    file: Path | None, methods: list[str] | None, seeds: list[int] | None
) -> Comparison:
    """The file's comparison, or the quick one, with the methods and seeds of the command line."""
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
