"""Rows, values and the summary of random runs."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sfprompt_bench.random_runs.draws import Draw
from sfprompt_bench.random_runs.measure import RandomRun

_ACCURACIES = ("start", "end", "majority", "noise")

COLUMNS = (*(field.name for field in fields(Draw)), *_ACCURACIES, "findings")


def append_row(path: Path, run: RandomRun) -> None:
    """Append a run to a CSV file, which gets a heading if it is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        known = run_json(run)
        writer.writerow(["" if known[name] is None else known[name] for name in COLUMNS])


def run_json(run: RandomRun) -> dict[str, Any]:
    """Convert a run to values for JSON and CSV; None for what a failed run has not."""
    accuracies = {
        name: None if math.isnan(getattr(run, name)) else round(getattr(run, name), 4)
        for name in _ACCURACIES
    }
    drawn = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(run.drawn).items()}
    return {**drawn, **accuracies, "findings": "; ".join(run.findings)}


def summary_line(runs: Sequence[RandomRun]) -> str:
    """Count runs and findings, and describe the change from round 0 to the end."""
    done = [run for run in runs if run.error is None]
    if not done:
        return f"{len(runs)} runs, none finished"
    changes = [100 * (run.end - run.start) for run in done]
    failed = len(runs) - len(done)
    below_start = sum(run.end < run.start - run.noise for run in done)
    below_majority = sum(run.end < run.majority - run.noise for run in done)
    return (
        f"{len(runs)} runs: {failed} failed, {below_start} end below round 0 by more than noise, "
        f"{below_majority} below the majority class. From round 0 to the end: "
        f"{statistics.fmean(changes):+.1f} points on average, {min(changes):+.1f} to "
        f"{max(changes):+.1f}"
    )
