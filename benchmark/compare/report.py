"""A comparison as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.table import Table

from benchmark.compare.charts import (
    LineChart,
    RowChart,
    accuracy_chart,
    device_chart,
    share_chart,
)
from benchmark.compare.comparison import Comparison, Values, point_name
from benchmark.compare.outcome import Outcome
from benchmark.compare.tables import cost_table, result_table
from protocol.traffic import Phase

_TEMPLATE = Path(__file__).with_name("report.html")
_MB = 1e6
_COLOURS = 16


@dataclass(frozen=True)
class _Rows:
    """A table's texts."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Section:
    """One point of the sweep."""

    title: str
    colours: dict[str, int]
    levels: dict[str, float]
    over_bytes: LineChart | None
    over_rounds: LineChart | None
    shares: RowChart | None
    by_device: RowChart | None
    results: _Rows
    costs: _Rows
    failures: tuple[str, ...]


def report_html(comparison: Comparison, outcomes: Sequence[Outcome], settings: str) -> str:
    """The page. ``settings`` is the resolved file, shown at its end."""
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
            _section(comparison, point, [one for one in outcomes if one.point == point])
            for point in comparison.points()
        ],
        phases=[str(phase) for phase in Phase],
        methods={one.method: one.what for one in outcomes},
        settings=settings,
    )


def _section(comparison: Comparison, point: Values, outcomes: Sequence[Outcome]) -> _Section:
    done = [one for one in outcomes if one.figures]
    colours = {one.method: number % _COLOURS for number, one in enumerate(outcomes)}
    curves = {one.method: one.curve() for one in done}
    levels = {
        one.method: accuracy
        for one in done
        if not curves[one.method] and (accuracy := one.mean("accuracy")) is not None
    }

    def over(axis: str, unit: float) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(at[axis] / unit, at["accuracy"]) for at in curve]
            for name, curve in curves.items()
        }

    phases = [str(phase) for phase in Phase]
    moved = {}
    for one in done:
        found = one.phase_bytes()
        moved[one.method] = {
            phase: sum(found[phase].values()) for phase in phases if phase in found
        }
    return _Section(
        title=point_name(point),
        colours=colours,
        levels=levels,
        over_bytes=accuracy_chart(
            over("bytes", _MB), levels, colours, x_label="MB, one device", logarithmic=True
        ),
        over_rounds=accuracy_chart(
            over("round", 1), levels, colours, x_label="rounds", logarithmic=False
        ),
        shares=share_chart(moved, colours),
        by_device=device_chart({one.method: one.clients() for one in done}, colours),
        results=_rows(result_table(outcomes, "", comparison.target_accuracy)),
        costs=_rows(cost_table(outcomes)),
        failures=tuple(f"{one.method}, {failure}" for one in outcomes for failure in one.failures),
    )


def _lead(comparison: Comparison) -> str:
    seeds = len(comparison.seeds)
    few = "" if comparison.shots is None else f"{comparison.shots} images a class, "
    return (
        f"{comparison.data}, {few}{_many(comparison.devices, 'device')}, {comparison.partition}, "
        f"{_many(comparison.rounds, 'round')}, {_many(seeds, 'seed')}"
    )


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _rows(table: Table) -> _Rows:
    columns = tuple(str(column.header) for column in table.columns)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    rows = zip(*cells, strict=True)
    return _Rows(columns, tuple(_without_empty(row) for row in rows))


def _without_empty(row: tuple[str, ...]) -> tuple[str, ...]:
    """A failed method's row has two cells; the table fills it up with empty ones."""
    return tuple(cell for cell in row if cell)


def _px(length: float) -> str:
    return f"{length:.1f}".removesuffix(".0")
