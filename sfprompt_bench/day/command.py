"""The command ``sfprompt-bench soak-day``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sfprompt_bench.presets import JsonFile
from sfprompt_bench.run.preflight import check_packages, make_run_folder

if TYPE_CHECKING:
    from sfprompt_bench.day.measurement import DayResult


def soak_day(
    hours: Annotated[float, typer.Option(min=1, help="Simulated hours.")] = 24,
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes that they take.")] = 5,
    devices: Annotated[int, typer.Option(min=2, max=1000, help="Devices that come and go.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of their behaviour.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for data, logs and the plot. Default: in runs/.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Simulate a day of a server: devices come, train, leave or fall silent, and come back.

    They speak the real protocol over sockets, without a model. All time-outs are shortened by the
    same factor. Memory and descriptors of the server must not grow from the day's second quarter
    to its last, files and database only by what a round leaves; else the exit code is 1.
    """
    check_packages()
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.day.chart import draw
    from sfprompt_bench.day.measurement import live_a_day

    console, folder = Console(), make_run_folder(out, "soak-day")
    columns = (TextColumn("simulated hours"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=hours)
        result = live_a_day(
            hours,
            minutes,
            devices,
            seed,
            folder,
            lambda hour: progress.update(task, completed=hour),
        )
    console.print(_table(result))
    console.print(f"plot: {draw(result, folder / 'day.png')}")
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if any(value > bound for value, bound in result.figures().values()):
        raise typer.Exit(1)


def _table(result: DayResult) -> Table:
    last = result.samples[-1]
    table = Table(
        title=f"{result.hours:g} simulated hours in {result.seconds:.0f} s: {last.rounds} rounds, "
        f"{last.participants} participants",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("", "measured", "bound"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, (value, bound) in result.figures().items():
        table.add_row(name, f"{value:.2f}", f"{bound:g}")
    return table
