"""The command ``sfprompt-bench traffic``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sfprompt_bench.presets import DTypeOption, JsonFile, traffic_preset
from sfprompt_bench.run.preflight import check_packages, make_run_folder


def traffic(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run on a few digits, in minutes.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Edge clients of a run. Default: 4, or 1 with --quick."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Use this seed; repeat the option for more. Default: 0, 1 and 2, or 0 with "
            "--quick.",
        ),
    ] = None,
    link: Annotated[
        str, typer.Option(help="Network to simulate between each device and the server.")
    ] = "20mbit,50ms",
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at the same time. Default: one for each CPU core, or two with --quick.",
        ),
    ] = None,
    dtype: DTypeOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results. Runs with a result there are not repeated. "
            "Default: runs/traffic-TIME."
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Run the paper's form, add one measure against traffic at a time, and report each."""
    check_packages()
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.run.processes import usable_cores
    from sfprompt_bench.traffic.ladder import LadderSetting, ladder, run_ladder
    from sfprompt_bench.traffic.report import (
        large_table,
        phase_table,
        plot_ladder,
        traffic_figures,
        traffic_table,
    )

    console = Console()
    folder = make_run_folder(out, "traffic")
    paper, default = (traffic_preset(form, quick=quick) for form in ("paper", "default"))
    seeds = tuple(seed or ((0,) if quick else (0, 1, 2)))
    # With few images, a run waits for its network most of the time.
    runs = usable_cores() * (2 if quick else 1)
    setting = LadderSetting(
        default, devices or (1 if quick else 4), seeds, link, at_once or runs, dtype
    )
    rungs = ladder(paper.settings, default.settings)
    results = run_ladder(rungs, setting, folder, console)
    for rung in rungs:
        console.print(f"  [bold]{rung.name}[/bold]: {rung.what}", highlight=False)
    console.print(phase_table(results, setting))
    console.print(traffic_table(results, setting))
    console.print(large_table(default.settings))
    console.print(f"  {plot_ladder(results, setting, folder / 'traffic.png')}", highlight=False)
    if json_file is not None:
        figures = traffic_figures(results, setting)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
