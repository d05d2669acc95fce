"""The command ``sfprompt-bench engine``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sfprompt_bench.engine.processes import divide_cores
from sfprompt_bench.engine.report import (
    Findings,
    curve_table,
    ratio_table,
    roundtrip_table,
    soak_table,
    throughput_table,
    write_findings,
)
from sfprompt_bench.engine.roundtrip import measure_roundtrip
from sfprompt_bench.engine.soak import measure_soak
from sfprompt_bench.engine.stand import Testbed, stand
from sfprompt_bench.engine.throughput import measure_curve, measure_throughput, points_of
from sfprompt_bench.engine.workload import QUICK, QUICK_CUT, EngineSetting, Load, Plan
from sfprompt_bench.presets import DTypeOption, JsonFile
from sfprompt_bench.run.preflight import run_folder


def engine(
    quick: Annotated[
        bool, typer.Option("--quick", help="Short repetitions: less than three minutes in all.")
    ] = False,
    backbone: Annotated[
        str, typer.Option(help="timm's name of the model; its weights are random.")
    ] = "vit_small_patch14_dinov2",
    image_size: Annotated[int, typer.Option(min=8, max=2048, help="Pixels a side.")] = 42,
    cut: Annotated[
        int | None, typer.Option(min=0, help="Blocks in the head. Default: 1, or 6 with --quick.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the body: auto | cuda | mps | cpu")] = "cpu",
    dtype: DTypeOption = "auto",
    minutes: Annotated[
        float | None, typer.Option(min=0.05, help="Of the soak. Default: 10, or 0.3 with --quick.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, max=1024, help="Of the soak.")] = 64,
    curve: Annotated[
        bool, typer.Option(help="The gain of batching over clients and batch: half of the time.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: runs/engine-TIME.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the split server's engine: against a plain loop, an echo, itself, and time."""
    console = Console()
    folder = run_folder(out, "engine")
    plan = QUICK if quick else Plan()
    plan = replace(plan, soak=Load(clients, plan.soak.batch))
    if minutes is not None:
        plan = replace(plan, soak_s=60 * minutes)
    if not curve:
        plan = replace(plan, curve_clients=())
    if cut is None:
        cut = QUICK_CUT if quick else 1
    setting = EngineSetting(backbone, image_size, cut, device, plan, dtype)
    found = measure_engine(setting, folder, console)
    show(found, console)
    for path in write_findings(found, folder):
        console.print(f"  {path}", highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=2) + "\n")


def measure_engine(setting: EngineSetting, folder: Path, console: Console) -> Findings:
    """Everything, one after the other, with a bar for each part.

    Raises:
        SFPromptError: a process ended early, or refused the setting.
    """
    cores = divide_cores()
    console.print("starting the server, its clients and the loop …")
    with (
        stand(setting, folder, cores) as place,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as bars,
    ):
        return _measured(place, bars)


def _measured(place: Testbed, bars: Progress) -> Findings:
    plan = place.setting.plan
    trip = measure_roundtrip(place, _bar(bars, "round trip", plan.turn_repetitions + 1))
    loads = len(plan.loads) * (plan.repetitions + 1)
    throughput = measure_throughput(place, _bar(bars, "throughput", loads))
    points = len(points_of(plan))
    curve = measure_curve(place, _bar(bars, "gain of batching", points)) if points else None
    whole = round(plan.soak_s)
    clock = bars.add_task(f"soak of {plan.soak.clients} clients, s", total=whole)
    soak = measure_soak(place, lambda s: bars.update(clock, completed=min(whole, round(s))))
    bars.update(clock, completed=whole)
    return Findings(place.setting, place.cores, place.limit, throughput, trip, curve, soak)


def show(found: Findings, console: Console) -> None:
    """All tables, the main one last."""
    console.print(throughput_table(found))
    console.print(roundtrip_table(found.roundtrip))
    if found.curve is not None:
        console.print(curve_table(found.curve))
    console.print(soak_table(found.soak))
    console.print(ratio_table(found))


def _bar(bars: Progress, name: str, total: int) -> Callable[[str], None]:
    task = bars.add_task(name, total=total)

    def advance(what: str) -> None:
        bars.update(task, advance=1, description=what)

    return advance
