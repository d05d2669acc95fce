"""A comparison as one page of HTML that needs nothing else."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.table import Table

from protocol.traffic import Phase, total_bytes
from sfprompt_bench.compare.charts import (
    LineChart,
    RowChart,
    accuracy_chart,
    device_chart,
    share_chart,
)
from sfprompt_bench.compare.config import Comparison, Values, point_name
from sfprompt_bench.compare.results import FIELDS, Outcome

MB = 1e6

_ABSENT = "-"

_APART = frozenset({Phase.INFERENCE, Phase.CONTROL})  # neither start nor training


def result_table(outcomes: Sequence[Outcome], title: str, target: float | None) -> Table:
    """Accuracy, worst device, bytes of one device in the whole run, privacy spent, and time.

    Of one point of a sweep, which is for the title to tell.
    """
    table = _table(title)
    columns = ["accuracy", "worst device", "MB in all"]
    columns += [] if target is None else [f"MB to {target:.0%}"]
    private = any(one.mean("epsilon") is not None for one in outcomes)
    columns += ["epsilon"] if private else []
    for name in (*columns, "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        if not one.figures:
            table.add_row(one.method, "failed", style="red")
            continue
        cells = [
            _with_spread(one, "accuracy", _percent),
            _with_spread(one, "accuracy_worst_client", _percent),
            _cell(one, "bytes_total", _megabytes),
        ]
        if target is not None:
            cells.append(_cell(one, "bytes_to_target", _megabytes))
        if private:
            cells.append(_cell(one, "epsilon", _short))
        table.add_row(one.method, *cells, _cell(one, "seconds", _whole_seconds))
    table.caption = (
        "Means over the seeds ± standard deviation. Bytes are those of one device at the socket, "
        "start included."
    )
    table.caption_justify = "left"
    return table


def cost_table(outcomes: Sequence[Outcome]) -> Table:
    """What one device sends, receives, computes and holds; calculated bytes beside measured."""
    table = _table("One device")
    names = ("tuned", "start", "up", "down", "calc.", "GFLOP", "memory", "CPU s")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        if one.figures:
            table.add_row(
                one.method,
                _cell(one, "trainable_parameters", _millions),
                _cell(one, "bytes_start", _megabytes),
                _cell(one, "bytes_up_per_round", _megabytes),
                _cell(one, "bytes_down_per_round", _megabytes),
                against_calculated(one),
                _cell(one, "device_flops_total", _giga),
                _cell(one, "device_peak_bytes", _megabytes),
                _cell(one, "device_seconds", _whole_seconds),
            )
    table.caption = (
        "Tuned numbers in millions; MB to start and in a round of training; bytes of start and "
        "training, measured over calculated payloads; operations of the run, counted on the meta "
        "device; peak memory in MB, libraries included."
    )
    table.caption_justify = "left"
    return table


def against_calculated(outcome: Outcome) -> str:
    """Bytes of start and training as measured, over the payloads that the calculator gives.

    Evaluation is left out: the calculator has none for some of the methods.
    """
    shares = []
    for one in outcome.figures:
        found = one["calculated"]
        if found is not None:
            rounds = found.get("rounds_trained", len(one["curve"]))  # older results have none
            each = found["bytes_up_per_round"] + found["bytes_down_per_round"]
            payload = found["bytes_start"] + found["bytes_up_once"] + rounds * each
            payload += found.get("bytes_renewed", 0)  # older results have none
            moved = {phase: ways for phase, ways in one["bytes"].items() if phase not in _APART}
            shares.append(total_bytes(moved) / payload)
    return f"{statistics.fmean(shares):.2f}x" if shares else _ABSENT


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _megabytes(count: float) -> str:
    return _short(count / MB)


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3f}"


def _giga(count: float) -> str:
    return _short(count / 1e9)


def _whole_seconds(seconds: float) -> str:
    return f"{seconds:,.0f}"


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("method", overflow="fold")
    return table


def _cell(outcome: Outcome, name: str, shown: Callable[[float], str]) -> str:
    mean = outcome.mean(name)
    return _ABSENT if mean is None else shown(mean)


def _with_spread(outcome: Outcome, name: str, shown: Callable[[float], str]) -> str:
    mean, spread = outcome.mean(name), outcome.spread(name)
    if mean is None or spread is None:
        return _ABSENT
    return f"{shown(mean)} ± {100 * spread:.1f}" if len(outcome.seeds) > 1 else shown(mean)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"


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
