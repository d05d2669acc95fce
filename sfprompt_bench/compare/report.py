"""A comparison's files: a page of HTML that needs no other file, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.table import Table

from protocol.traffic import Phase
from sfprompt_bench.compare.charts import (
    LineChart,
    RowChart,
    accuracy_chart,
    device_chart,
    share_chart,
)
from sfprompt_bench.compare.config import Comparison, Values, point_name
from sfprompt_bench.compare.results import FIELDS, Outcome
from sfprompt_bench.compare.tables import MB, cost_table, result_table

_TEMPLATE = Path(__file__).with_name("report.html")

_COLOURS = 16

_COUNTS = ("bytes_", "trainable_", "device_flops", "device_peak", "server_peak")


@dataclass(frozen=True)
class _TableText:
    """The cells of a table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Section:
    """The part of the page for one point of the sweep."""

    title: str
    colours: dict[str, int]
    levels: dict[str, float]
    over_bytes: LineChart | None
    over_rounds: LineChart | None
    shares: RowChart | None
    by_device: RowChart | None
    results: _TableText
    costs: _TableText
    failures: tuple[str, ...]


def report_html(comparison: Comparison, outcomes: Sequence[Outcome], settings: str) -> str:
    """Render the page. ``settings`` is the text of the resolved file, shown at its end."""
    # Names and errors come from files and logs: everything is escaped.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["px"] = _px
    page = environment.from_string(_TEMPLATE.read_text())
    return page.render(
        title=comparison.name,
        lead=_lead(comparison),
        sections=[
            _section(comparison, point, _at_point(outcomes, point)) for point in comparison.points()
        ],
        phases=[str(phase) for phase in Phase],
        methods={outcome.method: outcome.what for outcome in outcomes},
        settings=settings,
    )


def _at_point(outcomes: Sequence[Outcome], point: Values) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.point == point]


def _section(comparison: Comparison, point: Values, outcomes: Sequence[Outcome]) -> _Section:
    done = [outcome for outcome in outcomes if outcome.figures]
    colours = {outcome.method: number % _COLOURS for number, outcome in enumerate(outcomes)}
    curves = {outcome.method: outcome.curve() for outcome in done}
    levels = {
        outcome.method: accuracy
        for outcome in done
        if not curves[outcome.method] and (accuracy := outcome.mean("accuracy")) is not None
    }

    def over(axis: str, unit: float) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(point[axis] / unit, point["accuracy"]) for point in curve]
            for name, curve in curves.items()
        }

    return _Section(
        title=point_name(point),
        colours=colours,
        levels=levels,
        over_bytes=accuracy_chart(
            over("bytes", MB), levels, colours, x_label="MB, one device", logarithmic=True
        ),
        over_rounds=accuracy_chart(
            over("round", 1), levels, colours, x_label="rounds", logarithmic=False
        ),
        shares=share_chart({outcome.method: _bytes_by_phase(outcome) for outcome in done}, colours),
        by_device=device_chart(
            {outcome.method: outcome.device_accuracies() for outcome in done}, colours
        ),
        results=_table_text(result_table(outcomes, "", comparison.target_accuracy)),
        costs=_table_text(cost_table(outcomes)),
        failures=tuple(
            f"{outcome.method}, {failure}" for outcome in outcomes for failure in outcome.failures
        ),
    )


def _bytes_by_phase(outcome: Outcome) -> dict[str, float]:
    """Bytes of both directions, in the order of the phases."""
    counts = outcome.phase_bytes()
    return {str(phase): sum(counts[phase].values()) for phase in Phase if phase in counts}


def _lead(comparison: Comparison) -> str:
    shots = "" if comparison.shots is None else f"{comparison.shots} images a class, "
    return (
        f"{comparison.data}, {shots}{_count(comparison.devices, 'device')}, "
        f"{comparison.partition}, {_count(comparison.rounds, 'round')}, "
        f"{_count(len(comparison.seeds), 'seed')}"
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _table_text(table: Table) -> _TableText:
    columns = tuple(str(column.header) for column in table.columns)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    # A failed method's row has two cells; the table fills it up with empty ones.
    rows = (tuple(cell for cell in row if cell) for row in zip(*cells, strict=True))
    return _TableText(columns, tuple(rows))


def _px(length: float) -> str:
    return f"{length:.1f}".removesuffix(".0")


def comparison_json(comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Convert a comparison to values for JSON.

    ``methods`` is the first point of the sweep, and the only one without a sweep.
    """
    points = []
    for point in comparison.points():
        methods = {o.method: method_json(o) for o in _at_point(outcomes, point)}
        points.append({"sweep": point, "methods": methods})
    return {
        "name": comparison.name,
        "comparison": comparison.model_dump(mode="json"),
        "methods": points[0]["methods"],
        "points": points,
    }


def method_json(outcome: Outcome) -> dict[str, Any]:
    """Convert an outcome: means over the seeds, or None, and the standard deviations."""
    return {
        "what": outcome.what,
        **{name: _rounded(name, outcome.mean(name)) for name in FIELDS},
        "spread": {name: outcome.spread(name) for name in FIELDS},
        "seeds": list(outcome.seeds),
        "bytes": outcome.phase_bytes(),
        "accuracy_clients": outcome.device_accuracies(),
        "curve": outcome.curve(),
        "calculated": outcome.calculated(),
        "chosen": [figures.get("chosen", {}) for figures in outcome.figures],
        "failures": list(outcome.failures),
    }


def comparison_csv(outcomes: Sequence[Outcome]) -> str:
    """Write a row for each method at each point: means, then spreads."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spread_names = (f"{name}_spread" for name in FIELDS)
    writer.writerow(["method", "sweep", "seeds", *FIELDS, *spread_names, "failures"])
    for outcome in outcomes:
        means = [_rounded(name, outcome.mean(name)) for name in FIELDS]
        spreads = [outcome.spread(name) for name in FIELDS]
        seeds, failures = " ".join(map(str, outcome.seeds)), "; ".join(outcome.failures)
        point = point_name(outcome.point)
        row = [outcome.method, point, seeds, *means, *spreads, failures]
        writer.writerow(["" if cell is None else cell for cell in row])
    return out.getvalue()


def _rounded(name: str, mean: float | None) -> float | int | None:
    """Counts are whole numbers, and so are their means."""
    return round(mean) if mean is not None and name.startswith(_COUNTS) else mean
