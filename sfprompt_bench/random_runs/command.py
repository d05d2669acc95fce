"""The command ``sfprompt-bench random``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from sfprompt_bench.presets import JsonFile
from sfprompt_bench.run.preflight import check_packages

if TYPE_CHECKING:
    from sfprompt_bench.random_runs.measure import RandomRun


def random(
    count: Annotated[int, typer.Option(min=1, help="Number of runs.")] = 10,
    first: Annotated[
        int, typer.Option(min=0, help="Number of the first run; it determines the settings.")
    ] = 0,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", help="Append a row for each run to this file; it skips known ones."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Run the default form with random settings, and report runs that end below their start.

    Server and devices are threads of this process. Everything else is as in a run.
    """
    check_packages()
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.random_runs.draws import draw
    from sfprompt_bench.random_runs.measure import perform
    from sfprompt_bench.random_runs.node import running_node
    from sfprompt_bench.random_runs.report import append_row, run_json, summary_line

    console, runs = Console(), []
    known = _known(csv_file)
    for number in range(first, first + count):
        if number in known:
            continue
        # A server for each run: what one leaves behind has no effect on the next.
        with tempfile.TemporaryDirectory() as folder, running_node(Path(folder)) as node:
            run = perform(node, draw(number))
        runs.append(run)
        if csv_file is not None:
            append_row(csv_file, run)
        console.print(_line(run), highlight=False)
    console.print(_table([run for run in runs if run.findings]))
    console.print(summary_line(runs), highlight=False)
    if json_file is not None:
        values = [run_json(run) for run in runs]
        json_file.write_text(json.dumps(values, indent=2) + "\n")
    if any(run.findings for run in runs):
        raise typer.Exit(1)


def _known(csv_file: Path | None) -> set[int]:
    """The numbers of the runs that a file has."""
    if csv_file is None or not csv_file.exists():
        return set()
    return {int(line.split(",", 1)[0]) for line in csv_file.read_text().splitlines()[1:]}


def _line(run: RandomRun) -> str:
    drawn = run.drawn
    said = "; ".join(run.findings) or f"{run.start:.1%} after round 0, {run.end:.1%} at the end"
    return f"  {drawn.number}: {drawn.source}, {drawn.classes} classes: {said}"


def _table(runs: list[RandomRun]) -> Table:
    table = Table(title="Findings", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("run", "settings", "finding"):
        table.add_column(name, overflow="fold")
    for run in runs:
        values = {name: value for name, value in vars(run.drawn).items() if name != "number"}
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        table.add_row(str(run.drawn.number), shown, "; ".join(run.findings))
    return table
