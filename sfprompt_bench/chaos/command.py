"""The command ``sfprompt-bench chaos``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from protocol.errors import SFPromptError
from sfprompt_bench.run.preflight import check_packages, make_run_folder
from sfprompt_bench.run.processes import usable_cores

if TYPE_CHECKING:
    from sfprompt_bench.chaos.execution import RunResult


def chaos(
    faults: Annotated[int, typer.Option(min=1, help="Inject at least so many faults.")] = 200,
    runs: Annotated[
        int | None, typer.Option(min=1, help="End after so many runs. Default: no limit.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Begin no run after this time. Default: no limit.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first run; each further run has the next.")
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=64, help="Runs at once. Default: one for each core.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for logs. Default: runs/chaos-TIME.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON to standard output.")
    ] = False,
) -> None:
    """Inject faults into runs of real processes, and compare each with an undisturbed run.

    Exit code 1: a run did not finish, lost an update, counted one twice, or ended with another
    state than the undisturbed run, by a single bit.
    """
    if sys.platform != "linux":
        raise SFPromptError("faults are injected on Linux only", field="system", value=sys.platform)
    check_packages(("fastapi", "uvicorn", "sqlalchemy", "onnx", "sklearn"))
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.chaos.campaign import Campaign
    from sfprompt_bench.chaos.report import describe_failure, table_of, to_json

    console = Console(stderr=True)
    folder = make_run_folder(out, "chaos")
    campaign = Campaign(seed, faults, folder, jobs or usable_cores(), runs, minutes)
    started = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("undisturbed runs", total=faults)
        campaign.prepare()

        def show(result: RunResult) -> None:
            done, failed = len(campaign.results), len(campaign.failed)
            progress.update(
                task,
                description=f"faults ({done} runs, {failed} failed)",
                completed=min(len(campaign.injected), faults),
            )
            if result.problems:
                progress.console.print(describe_failure(result), highlight=False, markup=False)

        campaign.execute(show)
    seconds = time.monotonic() - started
    if as_json:
        typer.echo(json.dumps(to_json(campaign, seconds), indent=2))
    else:
        Console().print(table_of(campaign))
    failed = [str(result.seed) for result in campaign.failed]
    if not failed:
        console.print(
            f"all {len(campaign.results)} runs ended in the state of the undisturbed ones, "
            f"bit for bit, in {seconds:.0f} s"
        )
        return
    console.print(f"failed: the runs with seed {', '.join(failed)}; logs in {folder}")
    raise typer.Exit(1)
