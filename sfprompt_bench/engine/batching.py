"""The gain of batching over the number of clients and their batch size."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfprompt_bench.engine.server import OpenRun, ServerProcess, running_server
from sfprompt_bench.engine.spread import Spread
from sfprompt_bench.engine.testbed import Served, Testbed
from sfprompt_bench.engine.throughput import Advance, steps_for
from sfprompt_bench.engine.workload import Load, Plan

WITHOUT_BATCHING = {"max_batch_samples": 1}

_COLUMNS = (
    *("clients", "batch", "samples_per_s", "samples_per_s_alone"),
    *("gain", "gain_least", "gain_most"),
)


@dataclass(frozen=True)
class Point:
    """One load, served in turn with and without batching."""

    load: Load
    batched: Sequence[Served]
    unbatched: Sequence[Served]

    @property
    def gain(self) -> Spread:
        return Spread.of(
            [
                batched.samples_per_s / unbatched.samples_per_s
                for batched, unbatched in zip(self.batched, self.unbatched, strict=True)
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "clients": self.load.clients,
            "batch": self.load.batch,
            "samples_per_s": Spread.of([s.samples_per_s for s in self.batched]).to_json(),
            "samples_per_s_alone": Spread.of([s.samples_per_s for s in self.unbatched]).to_json(),
            "gain": self.gain.to_json(),
            "client_cpu_share": Spread.of([s.client_share for s in self.batched]).median,
        }


def curve_loads(plan: Plan) -> list[Load]:
    """The loads of the curve, the small ones first."""
    loads = [Load(c, b) for c in plan.curve_clients for b in plan.curve_batches]
    return sorted(
        (load for load in loads if load.samples <= plan.curve_samples),
        key=lambda load: (load.samples, load.clients),
    )


def measure_curve(testbed: Testbed, advance: Advance) -> list[Point]:
    """Measure each load of the curve on two servers in turn."""
    setting = testbed.setting
    settings = setting.placement | WITHOUT_BATCHING
    with running_server("server-alone", testbed.folder, testbed.cores, settings) as server:
        unbatched = (server, server.open_run(setting.run))
        return [_measure(testbed, load, unbatched, advance) for load in curve_loads(setting.plan)]


def _measure(
    testbed: Testbed, load: Load, unbatched: tuple[ServerProcess, OpenRun], advance: Advance
) -> Point:
    plan = testbed.setting.plan
    testbed.measure_server(load, 1)  # warms the server up
    rate = testbed.measure_server(load, 1, unbatched).samples_per_s
    steps = steps_for(load, rate, plan.curve_seconds)
    batched, alone = [], []
    for _ in range(plan.curve_repetitions):
        batched.append(testbed.measure_server(load, steps))
        alone.append(testbed.measure_server(load, steps, unbatched))
    advance(f"gain of batching {load}")
    return Point(load, batched, alone)


def write_csv(points: Sequence[Point], out: Path) -> Path:
    """Write a line for each point: medians, and the gain's minimum and maximum."""
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for point in points:
            figures = point.to_json()
            values = [figures["samples_per_s"]["median"], figures["samples_per_s_alone"]["median"]]
            values += [point.gain.median, point.gain.minimum, point.gain.maximum]
            load = [point.load.clients, point.load.batch]
            writer.writerow([*load, *(f"{value:.4g}" for value in values)])
    return out
