"""Tables and files of ``sfprompt-bench dominate``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from sfprompt_bench.dominate.verdicts import Score, Verdict

MB = 1e6

_ABSENT = "-"

VERDICT_COLUMNS = ("cell", "default", "best other", "its", "points", "in sd", "verdict")

_COLUMNS = (
    "cell",
    "data",
    "images",
    "devices",
    "partition",
    "method",
    "pooled",
    "seeds",
    "accuracy",
    "deviation",
    "bytes",
    "seconds",
    "default_minus_this",
    "in_deviations",
)  # of the CSV file

_COLOURS = {"first": "green", "tied": "yellow", "behind": "red"}


def verdict_rows(verdicts: Sequence[Verdict], *, pooled: bool) -> list[tuple[str, ...]]:
    """The rows of a table of verdicts; those in which another method wins come first.

    Args:
        verdicts: of all cells.
        pooled: whether references on pooled data count among the other methods.
    """
    judged = [
        (verdict.in_deviations(best), verdict, best)
        for verdict in verdicts
        if (best := verdict.best(pooled=pooled)) is not None
    ]
    return [
        (
            verdict.cell.name,
            _percent(verdict.default),
            best.method,
            _percent(best),
            f"{100 * verdict.difference(best):+.1f}",
            f"{distance:+.1f}",
            verdict.word(best),
        )
        for distance, verdict, best in sorted(judged, key=lambda item: item[0])
    ]


def verdict_table(verdicts: Sequence[Verdict], *, pooled: bool) -> Table:
    """Show the default form against the best other method of each cell; see `verdict_rows`."""
    others = "method" if pooled else "federated method"
    table = _table(f"The default form against the best other {others}", VERDICT_COLUMNS, (0, 2, 6))
    for row in verdict_rows(verdicts, pooled=pooled):
        table.add_row(*row[:-1], f"[{_COLOURS[row[-1]]}]{row[-1]}[/]")
    if pooled:
        table.caption = CAPTION
    return table


CAPTION = (
    "Accuracy in %: means over the seeds ± standard deviation. points: over the seeds that both "
    "have. in sd: the points in units of the pooled standard deviation; within one, the two are "
    "tied. Other methods count with their "
    "best measured round, the default form with its final state. References on pooled data see all "
    "images in one place."
)


def count_line(verdicts: Sequence[Verdict]) -> str:
    """Say in how many cells the default form is first, tied or behind."""
    parts = []
    for label, pooled in (("all others", True), ("federated methods", False)):
        words = [
            verdict.word(best) for verdict in verdicts if (best := verdict.best(pooled=pooled))
        ]
        counts = ", ".join(f"{words.count(word)} {word}" for word in ("first", "tied", "behind"))
        parts.append(f"against {label}: {counts} of {len(words)} cells")
    return "; ".join(parts)


def accuracy_table(verdicts: Sequence[Verdict]) -> Table:
    """Show each method with its bytes, and its accuracy in each cell, a column for each cell."""
    columns, rows = accuracy_rows(verdicts)
    table = _table("Accuracy of all methods", columns, (0,))
    for row in rows:
        table.add_row(*row)
    return table


def accuracy_rows(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of accuracies: a row for each method in each cell."""
    rows = [
        [
            verdict.cell.name,
            score.method,
            _percent(score),
            _megabytes(score),
            str(len(score.accuracies)),
        ]
        for verdict in verdicts
        for score in sorted(verdict.scores, key=lambda score: -score.mean)
    ]
    return ["cell", "method", "accuracy", "MB", "seeds"], rows


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Write the tables as Markdown, for a page."""
    heading = list(VERDICT_COLUMNS)
    columns, rows = accuracy_rows(verdicts)
    tables = [
        _markdown_table(heading, verdict_rows(verdicts, pooled=True)),
        CAPTION,
        _markdown_table(heading, verdict_rows(verdicts, pooled=False)),
        count_line(verdicts) + ".",
        _markdown_table(columns, rows),
    ]
    return "\n\n".join(tables) + "\n"


def scores_csv(verdicts: Sequence[Verdict]) -> str:
    """Write a row for each method in each cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for verdict in verdicts:
        cell = verdict.cell
        for score in verdict.scores:
            compared = score in verdict.comparable
            writer.writerow(
                [
                    cell.name,
                    cell.data,
                    cell.images,
                    cell.devices,
                    cell.kind,
                    score.method,
                    int(score.is_pooled),
                    " ".join(map(str, score.accuracies)),
                    f"{score.mean:.4f}",
                    f"{score.deviation:.4f}",
                    "" if score.nbytes is None else round(score.nbytes),
                    round(score.seconds),
                    f"{verdict.difference(score):.4f}" if compared else "",
                    f"{verdict.in_deviations(score):.2f}" if compared else "",
                ]
            )
    return out.getvalue()


def verdicts_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Convert the verdicts to values for JSON."""
    return {"summary": count_line(verdicts), "cells": [_cell_json(v) for v in verdicts]}


def _cell_json(verdict: Verdict) -> dict[str, Any]:
    values: dict[str, Any] = {
        "cell": asdict(verdict.cell) | {"name": verdict.cell.name},
        "methods": {score.method: _score_json(score) for score in verdict.scores},
        "failures": list(verdict.failures),
    }
    for key, pooled in (("against_all", True), ("against_federated", False)):
        best = verdict.best(pooled=pooled)
        if best is not None:
            distance = verdict.in_deviations(best)
            values[key] = {
                "best_other": best.method,
                "difference": verdict.difference(best),
                "in_deviations": distance if math.isfinite(distance) else None,
                "verdict": verdict.word(best),
            }
    return values


def _score_json(score: Score) -> dict[str, Any]:
    return asdict(score) | {"mean": score.mean, "deviation": score.deviation}


def _percent(score: Score | None) -> str:
    if score is None:
        return _ABSENT
    return f"{100 * score.mean:.1f} ± {100 * score.deviation:.1f}"


def _megabytes(score: Score | None) -> str:
    if score is None or score.nbytes is None:
        return _ABSENT
    megabytes = score.nbytes / MB
    return f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.1f}"


def _table(title: str, columns: Sequence[str], left: Sequence[int]) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.caption_justify = "left"
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number in left else "right", no_wrap=number != 2)
    return table


def _markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
