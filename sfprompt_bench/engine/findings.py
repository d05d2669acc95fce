"""All measurements of a benchmark of the engine: main figures, their targets, and plots."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sfprompt_bench.engine.loop import Roofline
from sfprompt_bench.engine.roundtrip import RoundTrip
from sfprompt_bench.engine.soak import Soak
from sfprompt_bench.engine.throughput import Point, Throughput, write_csv
from sfprompt_bench.engine.worker import Cores
from sfprompt_bench.engine.workload import EngineSetting
from sfprompt_bench.plots import new_figure, save

# By figure: the target, and whether it is a lower bound.
TARGETS: Final = {
    "throughput_vs_loop_8x16": (0.90, True),
    "throughput_vs_loop_8x32": (0.95, True),
    "throughput_vs_loop_1x32": (0.80, True),
    "roundtrip_vs_socket": (2.5, False),
    "fairness": (0.8, True),
    "p99_vs_median": (3.0, False),
    "memory_drift": (0.05, False),
}

_COLOURS = ("#1b6ca8", "#f0a202", "#3a7d44", "#c1121f", "#7b4b94", "#333333")

_MIB = 1024 * 1024


def meets_target(name: str, value: float) -> bool:
    """Whether a figure meets its target; one without a target does."""
    if name not in TARGETS:
        return True
    bound, is_lower = TARGETS[name]
    return value >= bound if is_lower else value <= bound


@dataclass(frozen=True)
class Findings:
    """The measurements of one benchmark."""

    setting: EngineSetting
    cores: Cores
    roofline: Roofline
    throughput: Sequence[Throughput]
    roundtrip: RoundTrip
    curve: Sequence[Point] | None  # None: not measured
    soak: Soak

    @property
    def ratios(self) -> dict[str, float]:
        """The main figures."""
        throughput = {f"throughput_vs_loop_{t.load}": t.ratio.median for t in self.throughput}
        return throughput | {
            "roundtrip_vs_socket": self.roundtrip.ratio.median,
            "fairness": self.soak.fairness,
            "p99_vs_median": self.soak.p99_vs_median,
        }

    @property
    def taken(self) -> float | None:
        """The share of the loop's cores that other programs used; None: not on the CPU."""
        if not self.roofline.device.startswith("cpu"):
            return None
        looped = [repetition for t in self.throughput for repetition in t.looped]
        available = self.cores.threads * sum(repetition.seconds for repetition in looped)
        return max(0.0, 1 - sum(repetition.cpu_s for repetition in looped) / available)

    def matrix_rate_share(self, throughput: Throughput) -> float:
        """The share of the device's measured matrix rate that the server uses."""
        return self.roofline.share(throughput.served_rate.median)

    def to_json(self) -> dict[str, Any]:
        return {
            "ratios": self.ratios,
            "taken_by_other_programs": self.taken,
            "machine": {
                "limit": self.roofline.to_json(),
                "server_cores": list(self.cores.server),
                "client_cores": list(self.cores.clients),
                "cores_shared": self.cores.shared,
                "threads": self.cores.threads,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "model": self.setting.model.model_dump(mode="json"),
            "throughput": [
                t.to_json() | {"share_of_matrix_rate": self.matrix_rate_share(t)}
                for t in self.throughput
            ],
            "roundtrip": self.roundtrip.to_json(),
            "curve": None if self.curve is None else [point.to_json() for point in self.curve],
            "soak": self.soak.to_json(),
        }


def write_findings(findings: Findings, folder: Path) -> list[Path]:
    """Write all figures and plots; return the files."""
    written = [folder / "engine.json"]
    written[0].write_text(json.dumps(findings.to_json(), indent=2) + "\n")
    if findings.curve is not None:
        written.append(write_csv(findings.curve, folder / "engine-batching.csv"))
        written.append(plot_curve(findings.curve, folder / "engine-batching.png"))
    written.append(plot_soak(findings.soak, folder / "engine-soak.png"))
    return written


def plot_curve(points: Sequence[Point], out: Path) -> Path:
    """Plot samples a second with and without batching, and the gain, over the clients."""
    figure, (left, right) = new_figure(1, 2, figsize=(10, 4))
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
    figure, (above, below) = new_figure(2, 1, figsize=(8, 6), sharex=True)
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
