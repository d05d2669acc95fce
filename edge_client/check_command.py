"""The command ``edge-client check``: check a data folder before joining a run with it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# Most modules are imported in functions: --help waits for none of them.
if TYPE_CHECKING:
    from rich.console import Console

    from edge_client.data.check import Finding, Report

_SHOWN = 5  # findings of each kind


def check(
    folder: Annotated[str, typer.Argument(help="The data folder, as in `join --data folder:…`.")],
    classes: Annotated[
        str | None, typer.Option(help="Names of the run's classes, separated by commas.")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0.01, max=0.9, help="Share of each class to test on, if there is no test folder."
        ),
    ] = 0.2,
    data_seed: Annotated[int, typer.Option(help="Seed of the choice of held-out images.")] = 0,
    background: Annotated[
        str,
        typer.Option(
            help="Colour behind transparent parts, #RRGGBB; the run's is model.background."
        ),
    ] = "#ffffff",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a data folder: count its images and report problems.

    The exit code is 0 without a problem, 1 with one, and 2 if the folder cannot be checked.
    """
    from rich.console import Console

    from edge_client.data.check import check_folder
    from edge_client.data.pictures import parse_colour
    from edge_client.reporter import BarReporter
    from protocol.errors import InvalidField

    try:
        behind = parse_colour(background)
    except ValueError as error:
        raise InvalidField(str(error), field="background", value=background) from error
    names = None
    if classes is not None:
        names = [name.strip() for name in classes.split(",") if name.strip()]
    reporter = BarReporter()
    try:
        report = check_folder(
            Path(folder.removeprefix("folder:")).expanduser(),
            class_names=names,
            held_out=held_out,
            seed=data_seed,
            background=behind,
            progress=lambda done, total: reporter.advance("reading", done, total),
        )
    finally:
        reporter.close()
    if as_json:
        typer.echo(json.dumps({**report.to_dict(), "has_problems": report.has_problems}))
    else:
        _print(report, Console(soft_wrap=True, highlight=False))
    if report.has_problems:
        raise typer.Exit(1)


def _print(report: Report, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(report.folder)}: {report.layout}", title_justify="left")
    table.add_column("class")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    for name, counts in report.classes.items():
        table.add_row(escape(name), str(counts["train"]), str(counts["test"]))
    for split in ("train", "test"):
        table.columns[1 if split == "train" else 2].footer = str(
            sum(counts[split] for counts in report.classes.values())
        )
    table.show_footer = True
    console.print(table)
    _print_counts(console, "sizes", report.sizes)
    _print_counts(console, "converted", report.converted)
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_kind[finding.kind].append(finding)
    for kind, findings in by_kind.items():
        colour = "red" if any(finding.is_problem for finding in findings) else "yellow"
        console.print(f"[{colour}]{kind}[/{colour}]: {len(findings)}")
        for finding in findings[:_SHOWN]:
            console.print(f"  {escape(finding.path)}: {escape(finding.reason)}")
        if len(findings) > _SHOWN:
            console.print(f"  … and {len(findings) - _SHOWN} more (--json lists all)")
    if not report.findings:
        console.print("no findings")


def _print_counts(console: Console, title: str, counts: dict[str, int]) -> None:
    from rich.markup import escape

    if counts:
        listed = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:_SHOWN])
        more = f", … {len(counts)} in all" if len(counts) > _SHOWN else ""
        console.print(f"{title}: {escape(listed)}{more}")
