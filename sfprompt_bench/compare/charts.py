"""Positions of a chart's marks, in units of the drawing; `report.html` draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720.0, 56.0, 16.0, 12.0, 44.0

_PLOT_HEIGHT = 300.0

_ROW_HEIGHT = 26.0

_NAME_WIDTH = 190.0

_TOTAL_WIDTH = 100.0

_MARGIN = 0.04  # share of a scale, beyond the extreme values


@dataclass(frozen=True)
class Tick:
    """A grid line with its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A dot or a bar, with a title that appears on hovering."""

    x: float
    y: float
    title: str
    width: float = 0.0
    kind: str = ""  # of a bar: its phase


@dataclass(frozen=True)
class Line:
    """One method's curve; ``colour`` is a number."""

    name: str
    colour: int
    marks: tuple[Mark, ...]

    @property
    def points(self) -> str:
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Level:
    """A method with a single value: a horizontal line."""

    name: str
    colour: int
    y: float
    title: str


@dataclass(frozen=True)
class LineChart:
    """Curves over common scales."""

    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    levels: tuple[Level, ...]
    width: float = WIDTH
    height: float = TOP + _PLOT_HEIGHT + BOTTOM
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = TOP + _PLOT_HEIGHT


@dataclass(frozen=True)
class Row:
    """One method's row."""

    name: str
    colour: int
    y: float  # of the row's middle
    marks: tuple[Mark, ...]
    total: str


@dataclass(frozen=True)
class RowChart:
    """A row for each method over a common scale."""

    x_label: str
    x_ticks: tuple[Tick, ...]
    rows: tuple[Row, ...]
    height: float
    width: float = WIDTH
    left: float = _NAME_WIDTH
    right: float = WIDTH - _TOTAL_WIDTH
    top: float = TOP

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM


Curve = Sequence[tuple[float, float]]  # x, accuracy as a share


def accuracy_chart(
    curves: Mapping[str, Curve],
    levels: Mapping[str, float],
    colours: Mapping[str, int],
    *,
    x_label: str,
    logarithmic: bool,
) -> LineChart | None:
    """Lay out accuracy over bytes (in MB, logarithmic) or rounds; None without any point.

    Args:
        curves: points of each method.
        levels: accuracy of methods without a curve.
        colours: a number for each method.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None
    shares = [share for _, share in points] + list(levels.values())
    low, high = _widened(min(shares), max(shares))
    low, high = max(0.0, low), min(1.0, high)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    x_of = _Scale(first, last, LEFT, WIDTH - RIGHT, logarithmic=logarithmic)
    bottom = TOP + _PLOT_HEIGHT

    def y_of(share: float) -> float:
        return bottom - (share - low) / (high - low) * _PLOT_HEIGHT

    def mark(name: str, x: float, share: float) -> Mark:
        title = f"{name}: {share:.1%} at {x:,.4g} {x_label.split(',')[0]}"
        return Mark(x_of(x), y_of(share), title)

    lines = tuple(
        Line(name, colours[name], tuple(mark(name, *point) for point in curve))
        for name, curve in curves.items()
        if curve
    )
    horizontals = tuple(
        Level(name, colours[name], y_of(share), f"{name}: {share:.1%}")
        for name, share in levels.items()
    )
    x_values = _log_ticks(first, last) if logarithmic else _ticks(first, last, whole=True)
    return LineChart(
        x_label,
        "accuracy (%)",
        tuple(Tick(x_of(x), f"{x:,g}") for x in x_values),
        tuple(Tick(y_of(y / 100), f"{y:g}") for y in _ticks(100 * low, 100 * high)),
        lines,
        horizontals,
    )


def share_chart(
    bytes_by_phase: Mapping[str, Mapping[str, float]], colours: Mapping[str, int]
) -> RowChart | None:
    """Lay out stacked shares of each method's bytes by phase, with the total in MB."""
    scale = _Scale(0, 1, _NAME_WIDTH, WIDTH - _TOTAL_WIDTH, logarithmic=False)
    rows: list[Row] = []
    for name, phases in bytes_by_phase.items():
        total = sum(phases.values())
        if total:
            y, left, marks = _row_y(len(rows)), 0.0, []
            for phase, count in phases.items():
                share = count / total
                start, end = scale(left), scale(left + share)
                title = f"{name}, {phase}: {count / 1e6:,.2f} MB ({share:.1%})"
                marks.append(Mark(start, y, title, end - start, phase))
                left += share
            rows.append(Row(name, colours[name], y, tuple(marks), f"{total / 1e6:,.1f} MB"))
    ticks = tuple(Tick(scale(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1))
    return _row_chart("share of the bytes of one device, whole run", ticks, rows)


def device_chart(
    by_device: Mapping[str, Mapping[str, float]], colours: Mapping[str, int]
) -> RowChart | None:
    """Lay out each device's accuracy as a dot, with a row for each method."""
    accuracies = [share for devices in by_device.values() for share in devices.values()]
    if not accuracies:
        return None
    low, high = _widened(min(accuracies), max(accuracies))
    low, high = max(0.0, low), min(1.0, high)
    scale = _Scale(low, high, _NAME_WIDTH, WIDTH - _TOTAL_WIDTH, logarithmic=False)
    rows: list[Row] = []
    for name, devices in by_device.items():
        if devices:
            y = _row_y(len(rows))
            marks = tuple(
                Mark(scale(share), y, f"{name}, {device}: {share:.1%}")
                for device, share in devices.items()
            )
            worst = f"worst {min(devices.values()):.1%}"
            rows.append(Row(name, colours[name], y, marks, worst))
    ticks = tuple(Tick(scale(y / 100), f"{y:g}") for y in _ticks(100 * low, 100 * high))
    return _row_chart("accuracy on each device's held-out samples (%)", ticks, rows)


class _Scale:
    """Maps values to positions between two edges."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, logarithmic: bool
    ) -> None:
        self._map = math.log10 if logarithmic else float
        first, last = self._map(low), self._map(high)
        span = (last - first) or 1.0
        margin = 0.0 if (low, high) == (0, 1) else _MARGIN * (end - start)
        self._low, self._start = first, start + margin
        self._factor = (end - start - 2 * margin) / span

    def __call__(self, value: float) -> float:
        return self._start + (self._map(value) - self._low) * self._factor


def _row_y(number: int) -> float:
    return TOP + _ROW_HEIGHT * (number + 0.5)


def _row_chart(label: str, ticks: tuple[Tick, ...], rows: Sequence[Row]) -> RowChart | None:
    if not rows:
        return None
    return RowChart(label, ticks, tuple(rows), TOP + _ROW_HEIGHT * len(rows) + BOTTOM)


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = _MARGIN * (high - low) or 0.01
    return low - margin, high + margin


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About six round numbers from ``low`` to ``high``."""
    span = (high - low) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    step = next(m * magnitude for m in (1, 2, 5, 10) if span / (m * magnitude) <= 7)
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step)
    count = int(math.floor(high / step + 1e-9) - first + 1)
    return [round((first + number) * step, 10) for number in range(max(0, count))]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten, or the powers alone over more than three decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]
