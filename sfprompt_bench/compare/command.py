"""The command ``sfprompt-bench compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import InvalidField
from sfprompt_bench.presets import JsonFile
from sfprompt_bench.run.preflight import PACKAGES, check_packages


def compare(
    file: Annotated[
        Path | None,
        typer.Argument(help="TOML file with the comparison's settings; see docs/compare.md."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare this method instead of the file's; repeat the option for more. "
            "docs/compare.md lists them."
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="Use this seed instead of the file's; repeat the option for more."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Compare five methods on a few digits, in minutes; takes no file."
        ),
    ] = False,
    at_once: Annotated[
        int,
        typer.Option(min=1, help="Runs at the same time. More than one makes each run slower."),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results. Runs with a result there are not repeated. "
            "Default: runs/compare-NAME-TIME."
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Log each run for TensorBoard to this folder (extra: tensorboard)."),
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(help="Log each run to MLflow at this tracking URI (extra: mlflow)."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Run methods side by side and report accuracy, bytes, compute, memory and time."""
    check_packages((*PACKAGES, "jinja2", "psutil"))
    if (file is None) != quick:
        raise InvalidField(
            "compare takes a file, or --quick",
            field="file",
            hint="docs/results/comparisons has example files",
        )
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from sfprompt_bench.compare.execution import compare_methods, read_comparison

    comparison = read_comparison(file, method, seed)
    if compare_methods(comparison, at_once, out, tensorboard, mlflow, json_file):
        raise typer.Exit(1)
