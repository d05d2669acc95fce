"""The plot of ``sfprompt-bench poison``."""

from __future__ import annotations

from pathlib import Path

from sfprompt_bench.plots import new_figure, save
from sfprompt_bench.poison.attacks import ATTACKS
from sfprompt_bench.poison.measure import PoisonResult


def draw(results: list[PoisonResult], out: Path) -> Path:
    """Plot the accuracy over the share of hostile devices, with one panel for each attack."""
    figure, panels = new_figure(1, len(ATTACKS), figsize=(3 * len(ATTACKS), 3.4), sharey=True)
    names = list(dict.fromkeys(result.rule for result in results))
    for axes, attack in zip(panels, ATTACKS, strict=True):
        for name in names:
            points = [r for r in results if r.rule == name and r.attack in (None, attack)]
            points.sort(key=lambda result: result.hostile)
            axes.plot(
                [100 * point.hostile for point in points],
                [100 * point.last for point in points],
                marker="o",
                label=name,
            )
        axes.set(title=attack, xlabel="hostile devices (%)")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=6, loc="outside lower center")
    return save(figure, out)
