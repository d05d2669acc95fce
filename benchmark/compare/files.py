"""A comparison as files for programs: JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from benchmark.compare.comparison import Comparison, point_name
from benchmark.compare.outcome import FIELDS, Outcome

_COUNTS = ("bytes_", "trainable_", "device_flops", "device_peak", "server_peak")


def comparison_json(comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything. ``methods`` is the first point of the sweep, the only one without a sweep."""
    points = []
    for point in comparison.points():
        here = [one for one in outcomes if one.point == point]
        points.append({"sweep": point, "methods": {one.method: method_json(one) for one in here}})
    return {
        "name": comparison.name,
        "comparison": comparison.model_dump(mode="json"),
        "methods": points[0]["methods"],
        "points": points,
    }


def method_json(outcome: Outcome) -> dict[str, Any]:
    """Means over the seeds, None where there is nothing to measure; ``spread`` beside them."""
    return {
        "what": outcome.what,
        **{name: _whole(name, outcome.mean(name)) for name in FIELDS},
        "spread": {name: outcome.spread(name) for name in FIELDS},
        "seeds": list(outcome.seeds),
        "bytes": outcome.phase_bytes(),
        "accuracy_clients": outcome.clients(),
        "curve": outcome.curve(),
        "calculated": outcome.calculated(),
        "failures": list(outcome.failures),
    }


def comparison_csv(outcomes: Sequence[Outcome]) -> str:
    """A row for each method at each point: means, then spreads."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "sweep", "seeds", *FIELDS, *(f"{name}_spread" for name in FIELDS), "failures"]
    )
    for one in outcomes:
        means = [_whole(name, one.mean(name)) for name in FIELDS]
        spreads = [one.spread(name) for name in FIELDS]
        seeds = " ".join(map(str, one.seeds))
        row = [one.method, point_name(one.point), seeds, *means, *spreads, "; ".join(one.failures)]
        writer.writerow(["" if cell is None else cell for cell in row])
    return out.getvalue()


def _whole(name: str, mean: float | None) -> float | int | None:
    """Counts are whole numbers, their means as well."""
    return round(mean) if mean is not None and name.startswith(_COUNTS) else mean
