"""The command ``sfprompt-bench dominate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol.errors import NotFound
from sfprompt_bench.dominate.cells import CELLS, QUICK, cells_named
from sfprompt_bench.presets import JsonFile
from sfprompt_bench.run.preflight import PACKAGES, check_packages, make_run_folder

_NAME = "dominate"


def dominate(
    cells: Annotated[
        str | None,
        typer.Option(
            help="Measure these cells, with commas between them and `*` for any text: "
            "'digits-*,fashion-mnist-60'. Default: all."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Measure these methods, with commas between them. Default: all."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of each cell.")] = 3,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A small edition: three cells, few methods, one seed."),
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="Runs at the same time. More than one makes each run slower."),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results. Runs with a result there are not repeated. "
            "Default: runs/dominate-TIME."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue in the newest runs/dominate-*.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Measure nothing: show the results that the folder has."),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure the default form and other methods in many cells, and judge who is first in each."""
    check_packages((*PACKAGES, "psutil"))
    known = cells_named(_split(cells), QUICK if quick and not cells else CELLS)
    folder = _newest() if resume and out is None else make_run_folder(out, _NAME)
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.dominate import chart, measure, timing
    from sfprompt_bench.dominate import report as reports
    from sfprompt_bench.methods.registry import get_method

    names = [get_method(name).name for name in _split(methods)]
    selection = measure.Selection(
        cells=known,
        methods=names or (measure.QUICK_METHODS if quick else measure.METHODS),
        seeds=range(1 if quick else seeds),
        test_images=measure.QUICK_TEST_IMAGES if quick else measure.TEST_IMAGES,
    )
    console = Console()
    planned = measure.plan_cells(selection, folder)
    if report:
        verdicts = measure.read_cells(selection, planned)
    else:
        missing = measure.missing_jobs(planned)
        seconds = timing.estimated_seconds(missing, selection.test_images)
        console.print(
            f"{len(missing)} runs in {len(known)} cells, about "
            f"{timing.describe_seconds(seconds)} on two cores; results in {folder}",
            highlight=False,
        )
        verdicts = measure.measure_cells(selection, planned, folder, jobs, console)
    console.print(reports.accuracy_table(verdicts))
    for pooled in (False, True):
        console.print(reports.verdict_table(verdicts, pooled=pooled))
    console.print(reports.count_line(verdicts), highlight=False)
    values = json.dumps(reports.verdicts_json(verdicts), indent=2) + "\n"
    for name, text in (
        ("csv", reports.scores_csv(verdicts)),
        ("md", reports.markdown(verdicts)),
        ("json", values),
    ):
        path = folder / f"{_NAME}.{name}"
        path.write_text(text)
        console.print(f"  {path}", highlight=False)
    if any(verdict.default for verdict in verdicts):
        console.print(f"  {chart.draw(verdicts, folder / f'{_NAME}.png')}", highlight=False)
    if json_file is not None:
        json_file.write_text(values)
    failures = [failure for verdict in verdicts for failure in verdict.failures]
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False)
    if failures:
        raise typer.Exit(1)


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()] if names else []


def _newest() -> Path:
    folders = sorted(Path("runs").glob(f"{_NAME}-*"))
    if not folders:
        raise NotFound(
            "there are no results to continue",
            field="resume",
            limit=f"a folder runs/{_NAME}-*",
            hint="leave --resume out, or name the folder with --out",
        )
    return folders[-1]
