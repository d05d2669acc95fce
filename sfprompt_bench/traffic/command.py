"""The command ``sfprompt-bench traffic``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol.presets import FORMS
from sfprompt_bench.presets import DTypeOption, JsonFile, traffic_preset
from sfprompt_bench.run.preflight import make_run_folder
from sfprompt_bench.run.processes import usable_cores
from sfprompt_bench.traffic.ladder import Setting, climb, ladder
from sfprompt_bench.traffic.report import (
    large_table,
    phase_table,
    plot_ladder,
    traffic_figures,
    traffic_table,
)


def traffic(
    quick: Annotated[
        bool, typer.Option("--quick", help="A small setting on the digits, in minutes.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Edge clients of a run. Default: 4, or 1 with --quick."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Again for more. Default: 0, 1 and 2.")
    ] = None,
    link: Annotated[
        str, typer.Option(help="The line of each device that is simulated.")
    ] = "20mbit,50ms",
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs at a time. Default: one for each CPU core, or two with --quick."
        ),
    ] = None,
    dtype: DTypeOption = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder; runs found there are not repeated.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Climb from the paper's form to the default, measure by measure: bytes, accuracy, time."""
    console = Console()
    folder = make_run_folder(out, "traffic")
    paper, default = (traffic_preset(form, quick=quick) for form in FORMS[::-1])
    seeds = tuple(seed or ((0,) if quick else (0, 1, 2)))
    # With few images, most of a run is waiting for the line.
    cores = usable_cores() * (2 if quick else 1)
    setting = Setting(default, devices or (1 if quick else 4), seeds, link, at_once or cores, dtype)
    rungs = ladder(paper.settings, default.settings)
    climbs = climb(rungs, setting, folder, console)
    for rung in rungs:
        console.print(f"  [bold]{rung.name}[/bold]: {rung.what}", highlight=False)
    console.print(phase_table(climbs, setting))
    console.print(traffic_table(climbs, setting))
    console.print(large_table(default.settings))
    console.print(f"  {plot_ladder(climbs, setting, folder / 'traffic.png')}", highlight=False)
    if json_file is not None:
        figures = traffic_figures(climbs, setting)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
