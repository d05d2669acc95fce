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

from sfprompt_bench.engine.findings import Findings, write_findings
from sfprompt_bench.engine.roundtrip import measure_roundtrip
from sfprompt_bench.engine.soak import measure_soak
from sfprompt_bench.engine.tables import (
    curve_table,
    ratio_table,
    roundtrip_table,
    soak_table,
    throughput_table,
)
from sfprompt_bench.engine.testbed import Testbed, running_testbed
from sfprompt_bench.engine.throughput import curve_loads, measure_curve, measure_throughput
from sfprompt_bench.engine.worker import divide_cores
from sfprompt_bench.engine.workload import QUICK, QUICK_CUT, EngineSetting, Load, Plan
from sfprompt_bench.presets import DTypeOption, JsonFile
from sfprompt_bench.run.preflight import make_run_folder


def engine(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Measure with few and short repetitions, in less than three minutes."
        ),
    ] = False,
    backbone: Annotated[
        str, typer.Option(help="timm's name of the model, which gets random weights.")
    ] = "vit_small_patch14_dinov2",
    image_size: Annotated[
        int, typer.Option(min=8, max=2048, help="Height and width of images in pixels.")
    ] = 42,
    cut: Annotated[
        int | None, typer.Option(min=0, help="Blocks in the head. Default: 1, or 6 with --quick.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device of the body: auto | cuda | mps | cpu")
    ] = "cpu",
    dtype: DTypeOption = "auto",
    minutes: Annotated[
        float | None,
        typer.Option(min=0.05, help="Length of the soak. Default: 10, or 0.3 with --quick."),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, max=1024, help="Clients of the soak.")] = 64,
    curve: Annotated[
        bool,
        typer.Option(
            help="Measure the gain of batching over clients and batch size, half of the time."
        ),
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results. Default: runs/engine-TIME.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the split server's engine: throughput, round trips, gain of batching and a soak.

    Throughput is compared with a plain loop over the same body, a round trip with two bare
    sockets, and batching with a server that does not batch.
    """
    console = Console()
    folder = make_run_folder(out, "engine")
    plan = QUICK if quick else Plan()
    plan = replace(plan, soak=Load(clients, plan.soak.batch))
    if minutes is not None:
        plan = replace(plan, soak_s=60 * minutes)
    if not curve:
        plan = replace(plan, curve_clients=())
    if cut is None:
        cut = QUICK_CUT if quick else 1
    setting = EngineSetting(backbone, image_size, cut, device, plan, dtype)
    findings = measure_engine(setting, folder, console)
    show(findings, console)
    for path in write_findings(findings, folder):
        console.print(f"  {path}", highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(findings.to_json(), indent=2) + "\n")


def measure_engine(setting: EngineSetting, folder: Path, console: Console) -> Findings:
    """Measure all parts one after the other, with a progress bar for each.

    Raises:
        SFPromptError: a process ended early, or refused the setting.
    """
    cores = divide_cores()
    console.print("starting the server, its clients and the loop …")
    with (
        running_testbed(setting, folder, cores) as testbed,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        return _measure(testbed, progress)


def _measure(testbed: Testbed, progress: Progress) -> Findings:
    plan = testbed.setting.plan
    trips = _bar(progress, "round trip", plan.roundtrip_repetitions + 1)
    roundtrip = measure_roundtrip(testbed, trips)
    loads = _bar(progress, "throughput", len(plan.loads) * (plan.repetitions + 1))
    throughput = measure_throughput(testbed, loads)
    curve = None
    if points := len(curve_loads(plan)):
        curve = measure_curve(testbed, _bar(progress, "gain of batching", points))
    seconds = round(plan.soak_s)
    bar = progress.add_task(f"soak of {plan.soak.clients} clients, s", total=seconds)
    soak = measure_soak(
        testbed, lambda passed: progress.update(bar, completed=min(seconds, round(passed)))
    )
    progress.update(bar, completed=seconds)
    setting, cores, roofline = testbed.setting, testbed.cores, testbed.roofline
    return Findings(setting, cores, roofline, throughput, roundtrip, curve, soak)


def show(findings: Findings, console: Console) -> None:
    """Print all tables, the main one last."""
    console.print(throughput_table(findings))
    console.print(roundtrip_table(findings.roundtrip))
    if findings.curve is not None:
        console.print(curve_table(findings.curve))
    console.print(soak_table(findings.soak))
    console.print(ratio_table(findings))


def _bar(progress: Progress, name: str, total: int) -> Callable[[str], None]:
    task = progress.add_task(name, total=total)

    def advance(description: str) -> None:
        progress.update(task, advance=1, description=description)

    return advance
