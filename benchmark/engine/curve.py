"""The gain of batching: the same server with it and without, over clients and batch."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.engine.hosted import Hosted, OpenRun, hosted
from benchmark.engine.setting import Load, Plan
from benchmark.engine.spread import Spread
from benchmark.engine.stand import Served, Stand
from benchmark.engine.throughput import steps_for

_COLUMNS = (
    *("clients", "batch", "samples_per_s", "samples_per_s_alone"),
    *("gain", "gain_least", "gain_most"),
)
WITHOUT_BATCHING = {"max_batch_samples": 1}


@dataclass(frozen=True)
class Point:
    """One load, served in turn with and without batching."""

    load: Load
    joined: Sequence[Served]
    alone: Sequence[Served]

    @property
    def gain(self) -> Spread:
        return Spread.of(
            [
                one.samples_per_s / other.samples_per_s
                for one, other in zip(self.joined, self.alone, strict=True)
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "clients": self.load.clients,
            "batch": self.load.batch,
            "samples_per_s": Spread.of([one.samples_per_s for one in self.joined]).to_json(),
            "samples_per_s_alone": Spread.of([one.samples_per_s for one in self.alone]).to_json(),
            "gain": self.gain.to_json(),
            "client_cpu_share": Spread.of([one.client_share for one in self.joined]).median,
        }


def points_of(plan: Plan) -> list[Load]:
    """The loads of the curve, the small ones first."""
    every = [Load(c, b) for c in plan.curve_clients for b in plan.curve_batches]
    return sorted(
        (load for load in every if load.samples <= plan.curve_samples),
        key=lambda load: (load.samples, load.clients),
    )


def measure_curve(stand: Stand, advance: Callable[[str], None]) -> list[Point]:
    """Every point of the plan, on two servers that take turns."""
    settings = stand.setting.place | WITHOUT_BATCHING
    with hosted("server-alone", stand.folder, stand.cores, settings) as alone:
        other = (alone, alone.open_run(stand.setting.run))
        return [_measure(stand, load, other, advance) for load in points_of(stand.setting.plan)]


def _measure(
    stand: Stand, load: Load, other: tuple[Hosted, OpenRun], advance: Callable[[str], None]
) -> Point:
    plan = stand.setting.plan
    stand.serve(load, 1)
    rate = stand.serve(load, 1, other).samples_per_s
    steps = steps_for(load, rate, plan.curve_seconds)
    joined, alone = [], []
    for _ in range(plan.curve_repetitions):
        joined.append(stand.serve(load, steps))
        alone.append(stand.serve(load, steps, other))
    advance(f"gain of batching {load}")
    return Point(load, joined, alone)


def write_csv(points: Sequence[Point], out: Path) -> Path:
    """A line for each point: medians, and the gain's least and greatest."""
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for point in points:
            figures = point.to_json()
            row = [figures["samples_per_s"]["median"], figures["samples_per_s_alone"]["median"]]
            row += [point.gain.median, point.gain.least, point.gain.most]
            loads = [point.load.clients, point.load.batch]
            writer.writerow([*loads, *(f"{value:.4g}" for value in row)])
    return out
