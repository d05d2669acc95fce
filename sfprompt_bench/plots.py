"""Plots of a run: accuracy and bytes over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from protocol.messages import RoundView
from protocol.traffic import Phase

COLOURS = {
    Phase.SMASHED: "#1b6ca8",
    Phase.FEATURES: "#6fb1dc",
    Phase.GRADIENTS: "#f0a202",
    Phase.UPDATES: "#3a7d44",
    Phase.INFERENCE: "#b7b7b7",
    Phase.DOWNLOAD: "#7b4b94",
    Phase.CONTROL: "#333333",
}

MB = 1e6

_RED = "#c1121f"

_MAX_SCALE = 4  # times the highest bar


def new_figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Make a figure that no window shows, and that leaves a notebook's settings alone.

    Args:
        rows: of panels.
        columns: of panels.
        options: ``figsize`` in inches, and arguments of `Figure.subplots`.

    Returns:
        The figure, and its axes as `Figure.subplots` returns them.
    """
    figure = Figure(figsize=options.pop("figsize"), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def draw_accuracy(rounds: Sequence[RoundView], title: str) -> Figure:
    """Plot the global state's accuracy on the held-out samples over rounds."""
    measured = [(view.round, view.accuracy) for view in rounds if view.accuracy is not None]
    figure, axes = new_figure(figsize=(6.4, 4))
    numbers = [number for number, _ in measured]
    percents = [100 * accuracy for _, accuracy in measured]
    axes.plot(numbers, percents, marker="o", color="#1b6ca8")
    discarded = [view for view in rounds if view.accuracy is not None and not view.kept]
    if discarded:
        axes.plot(
            [view.round for view in discarded],
            [100 * (view.accuracy or 0.0) for view in discarded],
            linestyle="none",
            marker="x",
            markersize=9,
            color=_RED,
            label="discarded",
        )
        axes.legend(frameon=False)
    kept = [view for view in rounds if view.accuracy is not None and view.kept]
    if kept:
        last = 100 * (kept[-1].accuracy or 0.0)
        axes.annotate(
            f"{last:.1f} %",
            (kept[-1].round, last),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right",
        )
    axes.set(xlabel="round", ylabel="accuracy on held-out samples (%)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 101))  # no share is above 100 %
    return figure


def draw_bytes(rounds: Sequence[RoundView], full_round_bytes: int, title: str) -> Figure:
    """Plot bytes at the socket by round and phase, and those of federated full fine-tuning."""
    figure, axes = new_figure(figsize=(6.4, 4))
    numbers = [view.round for view in rounds]
    bottom = [0.0] * len(rounds)
    for phase, colour in COLOURS.items():
        heights = [sum(view.traffic.get(phase, {}).values()) / MB for view in rounds]
        if any(heights):
            axes.bar(numbers, heights, bottom=bottom, color=colour, label=str(phase), width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    _mark_full(axes, full_round_bytes / MB, max(bottom, default=0.0))
    axes.set(xlabel="round", ylabel="MB at the socket, all devices", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    return figure


def _mark_full(axes: Axes, full: float, highest: float) -> None:
    """Mark the MB of federated full fine-tuning in a round; as text if bars would become tiny."""
    label, top = "federated full fine-tuning", max(full, highest)
    if 0 < highest < full / _MAX_SCALE:
        top = 1.15 * highest
        text = f"{label}: {full:,.0f} MB in every round ↑"
        axes.text(0.98, 0.97, text, color=_RED, ha="right", va="top", transform=axes.transAxes)
    else:
        axes.axhline(full, color=_RED, linestyle="--", label=label)
    axes.set_ylim(top=1.08 * top)


def save(figure: Figure, out: Path) -> Path:
    """Write a figure to a file, and return the file."""
    figure.savefig(out, dpi=150)
    return out
