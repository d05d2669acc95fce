"""The plot of ``sfprompt-bench dominate``: accuracy over the bytes of a device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator

from sfprompt_bench.dominate.report import MB
from sfprompt_bench.dominate.verdicts import DEFAULT, Verdict
from sfprompt_bench.plots import new_figure, save

# From the palette of Okabe and Ito, which colour-blind people can tell apart.
_DEFAULT_COLOUR, _FEDERATED_COLOUR, _POOLED_COLOUR = "#D55E00", "#0072B2", "#666666"

_WIDTH_INCHES, _PANEL_INCHES, _FONT = 5.2, 4.3, 11

_LABEL_GAP = 0.06  # between two names, as a share of a panel's height

_LEAST_POINTS = 3.0  # of the axis, above and below the default form


@dataclass(frozen=True)
class Dot:
    """One method over all cells of a data set.

    Attributes:
        method: its name.
        megabytes: of a device, geometric mean over the cells; None: pooled data.
        points: the method's accuracy minus the default form's in each cell, in points.
    """

    method: str
    megabytes: float | None
    points: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.points)


def dots_of(verdicts: Sequence[Verdict]) -> list[Dot]:
    """Collect each method's differences from the default form, by method."""
    points: dict[str, list[float]] = {}
    megabytes: dict[str, list[float]] = {}
    for verdict in verdicts:
        default = [] if verdict.default is None else [verdict.default]
        for score in (*default, *verdict.comparable):
            points.setdefault(score.method, []).append(-100 * verdict.difference(score))
            if score.nbytes is not None:
                megabytes.setdefault(score.method, []).append(score.nbytes / MB)
    return [
        Dot(
            method,
            statistics.geometric_mean(megabytes[method]) if method in megabytes else None,
            tuple(values),
        )
        for method, values in points.items()
    ]


def draw(verdicts: Sequence[Verdict], out: Path) -> Path:
    """Plot each method's accuracy, relative to the default form's, over its bytes.

    A panel for each data set. A dot is a method, its line the range over the cells. Above the
    default form's line a method is more accurate; to the right it moves more bytes. References on
    pooled data move none and stand at the right edge.
    """
    names = list(dict.fromkeys(verdict.cell.data for verdict in verdicts))
    with mpl.rc_context({"font.size": _FONT}):
        size = (_WIDTH_INCHES, _PANEL_INCHES * len(names))
        figure, panels = new_figure(len(names), figsize=size, squeeze=False)
        for axes, name in zip(panels[:, 0], names, strict=True):
            _draw_panel(axes, [verdict for verdict in verdicts if verdict.cell.data == name], name)
        return save(figure, out)


def _draw_panel(axes: Axes, verdicts: Sequence[Verdict], name: str) -> None:
    dots = dots_of(verdicts)
    known = [dot.megabytes for dot in dots if dot.megabytes is not None] or [1.0]
    low, edge = min(known) / 2, max(max(known) * 2.5, min(known) * 60)
    axes.set_xscale("log")
    axes.set_xlim(low, edge * 40)
    placed = []
    for dot in dots:
        colour, place = _style(dot, edge)
        lowest, highest = min(dot.points), max(dot.points)
        axes.plot([place, place], [lowest, highest], color=colour, linewidth=2, alpha=0.45)
        size = 110 if dot.method == DEFAULT else 45
        marker = "o" if dot.megabytes else "D"
        axes.scatter([place], [dot.mean], s=size, color=colour, marker=marker, zorder=3)
        placed.append((place, dot, colour))
    axes.axhline(0, color=_DEFAULT_COLOUR, linewidth=1, linestyle="--", zorder=1)
    axes.margins(y=0.12)
    low_y, high_y = axes.get_ylim()
    axes.set_ylim(min(low_y, -_LEAST_POINTS), max(high_y, _LEAST_POINTS))
    _label(axes, placed)
    cells = len(verdicts)
    axes.set(
        title=f"{name}: {cells} cell{'' if cells == 1 else 's'}",
        ylabel="points above the default form",
        xlabel="MB of a device, whole run",
    )
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [t for t in (1, 3, 10, 30, 100, 300, 1000, 3000) if low <= t <= max(known) * 1.5]
    axes.set_xticks([*ticks, edge * 1.3], [*(f"{t:,}" for t in ticks), "pooled"])
    axes.yaxis.set_major_formatter(FuncFormatter(_signed))
    axes.grid(axis="y", alpha=0.3)


def _signed(value: float, _: int | None) -> str:
    return f"{value:+g}" if value else "0"


def _style(dot: Dot, edge: float) -> tuple[str, float]:
    if dot.method == DEFAULT:
        return _DEFAULT_COLOUR, dot.megabytes or 1.0
    if dot.megabytes is None:
        return _POOLED_COLOUR, edge * 1.3
    return _FEDERATED_COLOUR, dot.megabytes


def _label(axes: Axes, placed: Sequence[tuple[float, Dot, str]]) -> None:
    """Write each name beside its dot, and move names apart that would overlap."""
    low, high = axes.get_ylim()
    step = (high - low) * _LABEL_GAP
    for pooled in (False, True):
        group = sorted(
            (p for p in placed if (p[1].megabytes is None) == pooled), key=lambda p: p[1].mean
        )
        last = low - step
        for place, dot, colour in group:
            height = max(dot.mean, last + step)
            last = height
            bold = dot.method == DEFAULT
            axes.text(
                place * 1.3,
                height,
                f"{dot.method}, default" if bold else dot.method,
                color=colour,
                va="center",
                fontweight="bold" if bold else "normal",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
