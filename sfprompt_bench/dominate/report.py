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

from sfprompt_bench.dominate.verdicts import DEFAULT, Score, Verdict

MB = 1e6

_ABSENT = "-"

VERDICT_COLUMNS = (
    "cell",
    "default form",
    "MB",
    "best other",
    "its accuracy",
    "points",
    "deviations",
    "verdict",
    "best other federated",
    "its accuracy",
    "MB",
    "verdict",
)

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


def verdict_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """The cells of the table of verdicts, those in which another method wins at the top."""
    ranked = sorted(verdicts, key=_rank)
    return [_row(verdict) for verdict in ranked if verdict.default is not None]


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Show the default form against the best other method of each cell."""
    table = Table(
        title="The default form against the best other method",
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, name in enumerate(VERDICT_COLUMNS):
        table.add_column(name, justify="left" if number in (0, 3, 7, 8, 11) else "right")
    for row in verdict_rows(verdicts):
        words = [f"[{_COLOURS[cell]}]{cell}[/]" if cell in _COLOURS else cell for cell in row]
        table.add_row(*words)
    return table


CAPTION = (
    "Means over the seeds ± standard deviation; MB of one device in the whole run. deviations: "
    "points in units of the pooled standard deviation; within one: tied. Other methods count with "
    "their best measured round, the default form with its final state. Pooled references see all "
    "images in one place."
)


def count_line(verdicts: Sequence[Verdict]) -> str:
    """Say in how many cells the default form is first, tied or behind."""
    parts = []
    for label, pooled in (("all others", True), ("federated methods", False)):
        words = [
            verdict.word(best)
            for verdict in verdicts
            if verdict.default and (best := verdict.best(pooled=pooled))
        ]
        counts = ", ".join(f"{words.count(word)} {word}" for word in ("first", "tied", "behind"))
        parts.append(f"against {label}: {counts} of {len(words)} cells")
    return "; ".join(parts)


def accuracy_table(verdicts: Sequence[Verdict]) -> Table:
    """Show the accuracy of each method, a row for each, in each cell."""
    table = Table(
        title="Accuracy, %", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    columns, rows = accuracy_rows(verdicts)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def accuracy_rows(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of accuracies: a row for each cell, a column a method."""
    methods = list(dict.fromkeys(score.method for v in verdicts for score in v.scores))
    rows = []
    for verdict in verdicts:
        by_method = {score.method: score for score in verdict.scores}
        cells = [_percent(by_method.get(method)) for method in methods]
        rows.append([verdict.cell.name, *cells])
    return ["cell", *methods], rows


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Write both tables as Markdown, for a page."""
    columns, rows = accuracy_rows(verdicts)
    tables = [(list(VERDICT_COLUMNS), verdict_rows(verdicts)), (columns, rows)]
    texts = [
        "\n".join(
            [
                _line(heading),
                _line(["---"] * len(heading)),
                *(_line(list(row)) for row in body),
            ]
        )
        for heading, body in tables
    ]
    return "\n\n".join([texts[0], CAPTION, count_line(verdicts) + ".", texts[1]]) + "\n"


def scores_csv(verdicts: Sequence[Verdict]) -> str:
    """Write a row for each method in each cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for verdict in verdicts:
        cell = verdict.cell
        for score in verdict.scores:
            compared = verdict.default is not None and score.method != DEFAULT
            writer.writerow(
                [
                    cell.name,
                    cell.data,
                    cell.images,
                    cell.devices,
                    cell.kind,
                    score.method,
                    int(score.is_pooled),
                    score.seeds,
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
        "methods": {score.method: asdict(score) for score in verdict.scores},
        "failures": list(verdict.failures),
    }
    for key, pooled in (("against_all", True), ("against_federated", False)):
        best = verdict.best(pooled=pooled)
        if best is not None and verdict.default is not None:
            distance = verdict.in_deviations(best)
            values[key] = {
                "best_other": best.method,
                "difference": verdict.difference(best),
                "in_deviations": distance if math.isfinite(distance) else None,
                "verdict": verdict.word(best),
            }
    return values


def _rank(verdict: Verdict) -> float:
    best = verdict.best()
    return verdict.in_deviations(best) if best and verdict.default else math.inf


def _row(verdict: Verdict) -> tuple[str, ...]:
    default, best = verdict.default, verdict.best()
    federated = verdict.best(pooled=False)
    cells = [verdict.cell.words, _percent(default), _megabytes(default)]
    if best is None:
        cells += [_ABSENT] * 5
    else:
        cells += [
            best.method,
            _percent(best),
            f"{100 * verdict.difference(best):+.1f}",
            f"{verdict.in_deviations(best):+.1f}",
            verdict.word(best),
        ]
    if federated is None:
        return (*cells, *[_ABSENT] * 4)
    return (
        *cells,
        federated.method,
        _percent(federated),
        _megabytes(federated),
        verdict.word(federated),
    )


def _percent(score: Score | None) -> str:
    if score is None:
        return _ABSENT
    return f"{100 * score.mean:.1f} ± {100 * score.deviation:.1f}"


def _megabytes(score: Score | None) -> str:
    if score is None or score.nbytes is None:
        return _ABSENT
    megabytes = score.nbytes / MB
    return f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.1f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
