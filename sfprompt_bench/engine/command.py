"""The command ``sfprompt-bench engine``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sfprompt_bench.presets import DTypeOption, JsonFile
from sfprompt_bench.run.preflight import check_packages, make_run_folder


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
    check_packages()
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.engine.findings import write_findings
    from sfprompt_bench.engine.measurement import measure_engine, show
    from sfprompt_bench.engine.workload import QUICK, QUICK_CUT, EngineSetting, Load, Plan

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
