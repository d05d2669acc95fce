"""Plots of the gain of batching and of the soak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from sfprompt_bench.engine.batching import Point
from sfprompt_bench.engine.soak import Soak
from sfprompt_bench.plots import save

_COLOURS = ("#1b6ca8", "#f0a202", "#3a7d44", "#c1121f", "#7b4b94", "#333333")

_MIB = 1024 * 1024


def plot_curve(points: Sequence[Point], out: Path) -> Path:
    """Plot samples a second with and without batching, and the gain, over the clients."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, batch in enumerate(sorted({point.load.batch for point in points})):
        line = sorted(
            (point for point in points if point.load.batch == batch),
            key=lambda point: point.load.clients,
        )
        clients = [point.load.clients for point in line]
        figures = [point.to_json() for point in line]
        colour = _COLOURS[number % len(_COLOURS)]
        batched = [values["samples_per_s"]["median"] for values in figures]
        unbatched = [values["samples_per_s_alone"]["median"] for values in figures]
        left.plot(clients, batched, marker="o", color=colour, label=f"batch {batch}")
        left.plot(clients, unbatched, marker="x", color=colour, linestyle="--")
        gains = [point.gain for point in line]
        right.errorbar(
            clients,
            [gain.median for gain in gains],
            yerr=[
                [gain.median - gain.minimum for gain in gains],
                [gain.maximum - gain.median for gain in gains],
            ],
            marker="o",
            color=colour,
            capsize=2,
        )
    left.set(xlabel="clients", ylabel="samples/s", title="solid: batching; dashed: without")
    left.set_ylim(bottom=0)
    right.set(xlabel="clients", ylabel="times as many samples/s", title="gain of batching")
    right.axhline(1, color="#999999", linewidth=1)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(fontsize="small", ncols=6, loc="outside lower center")
    return save(figure, out)


def plot_soak(soak: Soak, out: Path) -> Path:
    """Plot the server's resident memory and each step's time over the time of the soak."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    mebibytes = [nbytes / _MIB for _, nbytes in soak.memory]
    above.plot([second for second, _ in soak.memory], mebibytes, color="#1b6ca8")
    above.set(ylabel="resident memory (MiB)", title=f"{soak.load.clients} clients, one server")
    above.set_ylim(0, 1.15 * max(mebibytes))
    ends = [end for client in soak.ends for end in client]
    lengths = [length for client in soak.lengths for length in client]
    below.plot(ends, lengths, linestyle="", marker=".", markersize=2, alpha=0.4, color="#3a7d44")
    below.set(xlabel="seconds", ylabel="seconds of a step")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.axvspan(0, soak.warm_up_s, color="#999999", alpha=0.15)
        axes.grid(alpha=0.3)
    return save(figure, out)
