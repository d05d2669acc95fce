"""Where the marks of a chart go; `report.html` draws them. Lengths are those of the drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720.0, 56.0, 16.0, 12.0, 44.0

_PLOT_HEIGHT = 300.0

_ROW = 26.0

_NAMES = 190.0  # width of the rows' names

_TOTALS = 100.0

_MARGIN = 0.04  # of a scale, beyond the extreme values


@dataclass(frozen=True)
class Tick:
    """A line of the grid with its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """Something to point at, with what it says."""

    x: float
    y: float
    title: str
    width: float = 0.0
    kind: str = ""  # of a bar: its phase


@dataclass(frozen=True)
class Line:
    """One method's curve; ``colour`` is its number."""

    name: str
    colour: int
    marks: tuple[Mark, ...]

    @property
    def points(self) -> str:
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Level:
    """A method that has one value and no curve: a line across."""

    name: str
    colour: int
    y: float
    title: str


@dataclass(frozen=True)
class LineChart:
    """Curves over a common scale."""

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
    """One method's line of a chart of rows."""

    name: str
    colour: int
    y: float  # of its middle
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
    left: float = _NAMES
    right: float = WIDTH - _TOTALS
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
    """Accuracy over bytes (in MB, logarithmic) or rounds; None if there is nothing to draw."""
    every = [point for curve in curves.values() for point in curve]
    if not every:
        return None
    shares = [share for _, share in every] + list(levels.values())
    low, high = _widened(min(shares), max(shares))
    low, high = max(0.0, low), min(1.0, high)
    first, last = min(x for x, _ in every), max(x for x, _ in every)
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
    across = tuple(
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
        across,
    )


def share_chart(
    bytes_by_phase: Mapping[str, Mapping[str, float]], colours: Mapping[str, int]
) -> RowChart | None:
    """What each method's bytes are for: stacked shares, the total in MB beside them."""
    scale = _Scale(0, 1, _NAMES, WIDTH - _TOTALS, logarithmic=False)
    rows: list[Row] = []
    for name, phases in bytes_by_phase.items():
        total = sum(phases.values())
        if total:
            y, left, marks = _row_y(len(rows)), 0.0, []
            for phase, count in phases.items():
                share = count / total
                start, end = scale(left), scale(left + share)
                said = f"{name}, {phase}: {count / 1e6:,.2f} MB ({share:.1%})"
                marks.append(Mark(start, y, said, end - start, phase))
                left += share
            rows.append(Row(name, colours[name], y, tuple(marks), f"{total / 1e6:,.1f} MB"))
    ticks = tuple(Tick(scale(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1))
    return _row_chart("share of the bytes of one device, whole run", ticks, rows)


def device_chart(
    by_device: Mapping[str, Mapping[str, float]], colours: Mapping[str, int]
) -> RowChart | None:
    """Each device's accuracy as a dot, a row for each method."""
    every = [share for devices in by_device.values() for share in devices.values()]
    if not every:
        return None
    low, high = _widened(min(every), max(every))
    low, high = max(0.0, low), min(1.0, high)
    scale = _Scale(low, high, _NAMES, WIDTH - _TOTALS, logarithmic=False)
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
    """A value's place between two edges."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, logarithmic: bool
    ) -> None:
        self._map = math.log10 if logarithmic else float
        a, b = self._map(low), self._map(high)
        span = (b - a) or 1.0
        margin = 0.0 if (low, high) == (0, 1) else _MARGIN * (end - start)
        self._low, self._start = a, start + margin
        self._factor = (end - start - 2 * margin) / span

    def __call__(self, value: float) -> float:
        return self._start + (self._map(value) - self._low) * self._factor


def _row_y(number: int) -> float:
    return TOP + _ROW * (number + 0.5)


def _row_chart(label: str, ticks: tuple[Tick, ...], rows: Sequence[Row]) -> RowChart | None:
    if not rows:
        return None
    return RowChart(label, ticks, tuple(rows), TOP + _ROW * len(rows) + BOTTOM)


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = _MARGIN * (high - low) or 0.01
    return low - margin, high + margin


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, about six of them."""
    span = (high - low) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    step = next(m * magnitude for m in (1, 2, 5, 10) if span / (m * magnitude) <= 7)
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step)
    count = int(math.floor(high / step + 1e-9) - first + 1)
    return [round((first + number) * step, 10) for number in range(max(0, count))]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten, or the powers alone where these are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [value for value in every if low * 0.999 <= value <= high * 1.001]
