"""All measurements of a benchmark of the engine, its main figures and their targets."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sfprompt_bench.engine.batching import Point, write_csv
from sfprompt_bench.engine.cores import Cores
from sfprompt_bench.engine.loop import Roofline
from sfprompt_bench.engine.plots import plot_curve, plot_soak
from sfprompt_bench.engine.roundtrip import RoundTrip
from sfprompt_bench.engine.soak import Soak
from sfprompt_bench.engine.throughput import Throughput
from sfprompt_bench.engine.workload import EngineSetting

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
