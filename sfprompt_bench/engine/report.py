"""The benchmark's figures for people and for scripts."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from matplotlib import pyplot as plt
from rich.table import Table

from sfprompt_bench.engine.baselines import Limit
from sfprompt_bench.engine.processes import Cores
from sfprompt_bench.engine.roundtrip import RoundTrip
from sfprompt_bench.engine.soak import Soak
from sfprompt_bench.engine.throughput import Point, Throughput, write_csv
from sfprompt_bench.engine.workload import EngineSetting
from sfprompt_bench.plots import save

_COLOURS = ("#1b6ca8", "#f0a202", "#3a7d44", "#c1121f", "#7b4b94", "#333333")

_MIB = 1024 * 1024


def plot_curve(points: Sequence[Point], out: Path) -> Path:
    """Samples a second with batching and without, and the gain, over the number of clients."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, batch in enumerate(sorted({point.load.batch for point in points})):
        line = sorted(
            (point for point in points if point.load.batch == batch),
            key=lambda point: point.load.clients,
        )
        clients = [point.load.clients for point in line]
        figures = [point.to_json() for point in line]
        colour = _COLOURS[number % len(_COLOURS)]
        joined = [one["samples_per_s"]["median"] for one in figures]
        alone = [one["samples_per_s_alone"]["median"] for one in figures]
        left.plot(clients, joined, marker="o", color=colour, label=f"batch {batch}")
        left.plot(clients, alone, marker="x", color=colour, linestyle="--")
        gains = [point.gain for point in line]
        right.errorbar(
            clients,
            [gain.median for gain in gains],
            yerr=[
                [gain.median - gain.least for gain in gains],
                [gain.most - gain.median for gain in gains],
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
    """Resident memory of the server and the time of every step, over the time of the soak."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    above.plot(
        [second for second, _ in soak.memory],
        [nbytes / _MIB for _, nbytes in soak.memory],
        color="#1b6ca8",
    )
    above.set(ylabel="resident memory (MiB)", title=f"{soak.load.clients} clients, one server")
    above.set_ylim(0, 1.15 * max(nbytes / _MIB for _, nbytes in soak.memory))
    ends = [end for every in soak.ends for end in every]
    lengths = [length for every in soak.lengths for length in every]
    below.plot(ends, lengths, linestyle="", marker=".", markersize=2, alpha=0.4, color="#3a7d44")
    below.set(xlabel="seconds", ylabel="seconds of a step")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.axvspan(0, soak.warm_up_s, color="#999999", alpha=0.15)
        axes.grid(alpha=0.3)
    return save(figure, out)


# By figure: the bound that it should keep, and whether it is a lower one.
TARGETS: Final = {
    "throughput_vs_loop_8x16": (0.90, True),
    "throughput_vs_loop_8x32": (0.95, True),
    "throughput_vs_loop_1x32": (0.80, True),
    "roundtrip_vs_socket": (2.5, False),
    "fairness": (0.8, True),
    "p99_vs_median": (3.0, False),
    "memory_drift": (0.05, False),
}

_DISTURBED = 0.05  # share of the cores that others may take before it is said


@dataclass(frozen=True)
class Findings:
    """Everything that one run of the benchmark has measured."""

    setting: EngineSetting
    cores: Cores
    limit: Limit  # of the device that bodies run on
    throughput: Sequence[Throughput]
    roundtrip: RoundTrip
    curve: Sequence[Point] | None  # None: left out
    soak: Soak

    @property
    def ratios(self) -> dict[str, float]:
        """The main figures."""
        found = {f"throughput_vs_loop_{t.load}": t.ratio.median for t in self.throughput}
        return found | {
            "roundtrip_vs_socket": self.roundtrip.ratio.median,
            "fairness": self.soak.fairness,
            "p99_vs_median": self.soak.p99_vs_median,
        }

    @property
    def taken(self) -> float | None:
        """The share of its cores that other programs took from the loop; None: not on the CPU."""
        if not self.limit.device.startswith("cpu"):
            return None
        looped = [one for t in self.throughput for one in t.looped]
        whole = self.cores.threads * sum(one.seconds for one in looped)
        return max(0.0, 1 - sum(one.cpu_s for one in looped) / whole)

    def share(self, one: Throughput) -> float:
        """How much of the device's measured matrix rate the server makes use of."""
        return self.limit.share(one.served_rate.median)

    def to_json(self) -> dict[str, Any]:
        return {
            "ratios": self.ratios,
            "taken_by_other_programs": self.taken,
            "machine": {
                "limit": self.limit.to_json(),
                "server_cores": list(self.cores.server),
                "client_cores": list(self.cores.clients),
                "cores_shared": self.cores.shared,
                "threads": self.cores.threads,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "model": self.setting.model.model_dump(mode="json"),
            "throughput": [
                one.to_json() | {"share_of_matrix_rate": self.share(one)} for one in self.throughput
            ],
            "roundtrip": self.roundtrip.to_json(),
            "curve": None if self.curve is None else [one.to_json() for one in self.curve],
            "soak": self.soak.to_json(),
        }


def keeps(name: str, value: float) -> bool:
    """Whether a figure keeps its target, if it has one."""
    if name not in TARGETS:
        return True
    bound, lower = TARGETS[name]
    return value >= bound if lower else value <= bound


def ratio_table(found: Findings) -> Table:
    """The main figures beside their targets."""
    spreads = {f"throughput_vs_loop_{t.load}": t.ratio for t in found.throughput}
    spreads["roundtrip_vs_socket"] = found.roundtrip.ratio
    table = Table(title=f"The engine on {found.limit}", title_justify="left")
    table.add_column("figure")
    for name in ("value", "least … most", "target"):
        table.add_column(name, justify="right")
    for name, value in (found.ratios | {"memory_drift": found.soak.memory_drift}).items():
        spread = spreads.get(name)
        colour = "green" if keeps(name, value) else "red"
        table.add_row(
            name,
            f"[{colour}]{value:.3f}[/{colour}]",
            f"{spread.least:.3f} … {spread.most:.3f}" if spread else "",
            _target(name),
        )
    table.caption = _caption(found)
    table.caption_justify = "left"
    return table


def throughput_table(found: Findings) -> Table:
    """Samples a second, and who was busy."""
    table = Table(title="Samples a second", title_justify="left")
    table.add_column("clients x batch")
    for name in ("server", "loop, one batch", "loop, client's batch"):
        table.add_column(name, justify="right")
    for name in ("of matrix rate", "CPU ratio", "server's CPU", "clients' CPU"):
        table.add_column(name, justify="right")
    for one in found.throughput:
        figures = one.to_json()
        table.add_row(
            str(one.load),
            f"{figures['server_samples_per_s']['median']:,.1f}",
            f"{figures['loop_samples_per_s']['median']:,.1f}",
            f"{one.looped_small.samples_per_s:,.1f}",
            f"{found.share(one):.0%}",
            f"{one.cpu_ratio:.3f}",
            f"{figures['server_busy_share']['median']:.0%}",
            f"{figures['client_cpu_share']['median']:.1%}",
        )
    rate, sample = found.limit.flops_per_s / 1e9, found.limit.sample_flops / 1e9
    table.caption = (
        f"Matrix rate: {rate:,.0f} GFLOP/s in one large product, measured; a sample takes "
        f"{sample:.3g} GFLOP, forward and input gradient. "
        "CPU ratio: the loop's CPU seconds a sample over the server's; other programs change it "
        "less than the clock. CPU: seconds of the processor in a second, 100 % is one core."
    )
    table.caption_justify = "left"
    return table


def roundtrip_table(trip: RoundTrip) -> Table:
    """Where the processor's time of a round trip goes."""
    figures = trip.to_json()
    table = Table(
        title=f"{trip.nbytes / 1e6:.2f} MB there and back: {1e3 * figures['seconds']:.2f} ms; "
        f"bare sockets: {1e3 * figures['echo_seconds']:.2f} ms",
        title_justify="left",
    )
    table.add_column("stage")
    table.add_column("CPU ms for a MB there and back", justify="right")
    for name, value in trip.budget.items():
        table.add_row(name, f"{value:.3f}")
    cpu = trip.cpu
    table.add_section()
    table.add_row("all of the client", f"{2 * cpu['client']:.3f}")
    table.add_row("all of the server", f"{2 * cpu['server']:.3f}")
    table.add_row("both, over the bare sockets'", f"{trip.cpu_ratio:.2f} times")
    return table


def curve_table(points: Sequence[Point]) -> Table:
    """The gain of batching, point by point."""
    table = Table(title="Gain of batching", title_justify="left")
    for name in ("clients", "batch", "samples/s", "without", "gain", "least … most"):
        table.add_column(name, justify="right")
    for point in points:
        figures, gain = point.to_json(), point.gain
        table.add_row(
            str(point.load.clients),
            str(point.load.batch),
            f"{figures['samples_per_s']['median']:,.1f}",
            f"{figures['samples_per_s_alone']['median']:,.1f}",
            f"{gain.median:.2f}",
            f"{gain.least:.2f} … {gain.most:.2f}",
        )
    return table


def soak_table(soak: Soak) -> Table:
    """The soak in a few lines."""
    figures = soak.to_json()
    table = Table(
        title=f"{soak.load.clients} clients of batch {soak.load.batch} for {soak.seconds:,.0f} s",
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("samples/s", f"{figures['samples_per_s']:,.1f}"),
        ("step: median", f"{figures['step_s_median']:.3f} s"),
        ("step: p99", f"{figures['step_s_p99']:.3f} s"),
        ("steps of the slowest client", str(figures["steps_least"])),
        ("steps of the fastest client", str(figures["steps_most"])),
        ("resident memory of the server", f"{figures['memory_mib_median']:,.0f} MiB"),
        ("told to wait", str(soak.waits)),
        ("steps sent again", str(soak.lost)),
        ("clients' CPU, of one core", f"{soak.client_share:.1%}"),
    ):
        table.add_row(name, value)
    return table


def write_findings(found: Findings, folder: Path) -> list[Path]:
    """All figures and pictures of a benchmark; where they lie."""
    written = [folder / "engine.json"]
    written[0].write_text(json.dumps(found.to_json(), indent=2) + "\n")
    if found.curve is not None:
        written.append(write_csv(found.curve, folder / "engine-batching.csv"))
        written.append(plot_curve(found.curve, folder / "engine-batching.png"))
    written.append(plot_soak(found.soak, folder / "engine-soak.png"))
    return written


def _target(name: str) -> str:
    if name not in TARGETS:
        return ""
    bound, lower = TARGETS[name]
    return f"{'≥' if lower else '≤'} {bound:g}"


def _caption(found: Findings) -> str:
    cores, taken = found.cores, found.taken
    if cores.shared:
        return (
            "[red]Server and clients share their cores here: the figures against the loop are too "
            "low.[/red]"
        )
    held = f"Server and loop on cores {list(cores.server)}, clients on {list(cores.clients)}."
    if taken is None or taken < _DISTURBED:
        return held
    return (
        f"{held} [yellow]Other programs took {taken:.0%} of the loop's cores meanwhile: trust the "
        "ratios of CPU time more than those of the clock.[/yellow]"
    )
