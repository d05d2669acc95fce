"""The command ``sfprompt-bench fuzz``."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sfprompt_bench.fuzz.findings import Report
from sfprompt_bench.presets import JsonFile
from sfprompt_bench.run.preflight import check_packages, make_run_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


_CROWD_S = 5.0  # of each measurement


def fuzz(
    frames: Annotated[
        int, typer.Option(min=0, help="Mutated frames and messages to decode in this process.")
    ] = 1_000_000,
    requests: Annotated[
        int, typer.Option(min=0, help="Mutated and broken requests to a server.")
    ] = 100_000,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the first input; each further one has the next number."),
    ] = 0,
    crowd: Annotated[
        int,
        typer.Option(min=0, max=20_000, help="Idle and slow connections beside a device's steps."),
    ] = 2000,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the server's data and logs. Default: in runs/.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Decode mutated frames, and send mutated and broken requests to a server.

    A frame may decode or raise a typed error, within limits of time and memory. The server may
    refuse a request with a typed error or close the connection; it may not fail, hang or grow,
    and afterwards a device must finish a run on it. Everything else is a finding, listed with the
    seed that repeats it; then the exit code is 1.
    """
    check_packages()
    # Imported here: torch takes seconds to import, which help and errors do not need.
    import torch

    from sfprompt_bench.fuzz.frames import fuzz_frames

    torch.set_num_threads(1)
    console = Console()
    reports: list[Report] = []
    if frames:
        with _progress(console, "frames and messages", frames) as tick:
            reports.append(fuzz_frames(frames, seed, tick))
    if requests:
        folder = make_run_folder(out, "fuzz")
        reports.append(_fuzz_server(console, requests, seed, crowd, folder))
    for report in reports:
        for line in report.lines():
            console.print(line, markup=False, highlight=False)
    if json_file is not None:
        figures = [report.to_json() for report in reports]
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if any(report.findings for report in reports):
        raise typer.Exit(1)


def _fuzz_server(console: Console, count: int, seed: int, crowd: int, folder: Path) -> Report:
    from sfprompt_bench.engine.server import running_server
    from sfprompt_bench.engine.worker import divide_cores
    from sfprompt_bench.fuzz.afterwards import check_log, finish_run
    from sfprompt_bench.fuzz.crowding import measure_crowds
    from sfprompt_bench.fuzz.requests import fuzz_requests
    from sfprompt_bench.fuzz.target import SERVER_SETTINGS, Target
    from split_server.client import read_token

    console.print("starting a server …")
    with running_server("server", folder, divide_cores(), SERVER_SETTINGS) as server:
        target = Target(server.url, read_token(server.data_dir), server.pid)
        fresh = Report("Connections", "connections")
        if crowd:
            console.print(f"{crowd:,} idle, then slow connections …")
            measure_crowds(target, crowd, _CROWD_S, folder, fresh)
        with _progress(console, "requests", count) as tick:
            report = fuzz_requests(target, count, seed, tick)
        report.notes[:0] = fresh.notes
        report.findings[:0] = fresh.findings
        console.print("a device takes part in a run …")
        finish_run(target, folder, report)
        check_log(folder / "server.log", report)
    return report


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar while the block runs."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
