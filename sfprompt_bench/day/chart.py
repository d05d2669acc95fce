"""The plot of ``sfprompt-bench soak-day``."""

from __future__ import annotations

from pathlib import Path

from sfprompt_bench.day.measurement import DayResult
from sfprompt_bench.plots import new_figure, save

_MIB = 1024 * 1024


def draw(result: DayResult, out: Path) -> Path:
    """Plot memory, descriptors, files and database over the simulated hours."""
    hours = [sample.hour for sample in result.samples]
    panels = {
        "resident memory (MiB)": [sample.memory / _MIB for sample in result.samples],
        "connections, and other descriptors": [float(s.connections) for s in result.samples],
        "files": [float(sample.files) for sample in result.samples],
        "database (MiB)": [sample.database / _MIB for sample in result.samples],
    }
    figure, axes = new_figure(2, 2, figsize=(8, 5), sharex=True)
    for panel, (name, values) in zip(axes.flat, panels.items(), strict=True):
        panel.plot(hours, values, color="#1b6ca8")
        panel.set(title=name)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0][1].plot(hours, [sample.descriptors for sample in result.samples], color="#f0a202")
    for panel in axes[1]:
        panel.set(xlabel="simulated hour")
    return save(figure, out)
