"""All measurements of the engine, one after the other, and their tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sfprompt_bench.engine.findings import Findings
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
from sfprompt_bench.engine.workload import EngineSetting


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
