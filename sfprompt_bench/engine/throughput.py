"""Samples a second through the server, against a plain loop over the same body."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfprompt_bench.engine.processes import OpenRun, ServerProcess, hosted
from sfprompt_bench.engine.stand import Looped, Served, Testbed
from sfprompt_bench.engine.workload import Load, Plan, Spread

Advance = Callable[[str], None]  # told what has been done

_LEAST_STEPS = 2


@dataclass(frozen=True)
class Throughput:
    """One load: repetitions of the server, each between two of the loop.

    Attributes:
        load: the clients and their batch.
        steps: of each client, in one repetition.
        served: by the server.
        looped: by the loop with all clients' samples in one batch; one more than ``served``.
        looped_small: by the loop with the batch of one client.
    """

    load: Load
    steps: int
    served: Sequence[Served]
    looped: Sequence[Looped]
    looped_small: Looped

    @property
    def ratio(self) -> Spread:
        """The server's samples a second over the mean of the loop's before and after it."""
        return Spread.of(
            [
                one.samples_per_s / statistics.fmean([a.samples_per_s, b.samples_per_s])
                for one, a, b in zip(self.served, self.looped, self.looped[1:], strict=False)
            ]
        )

    @property
    def served_rate(self) -> Spread:
        """The server's samples a second."""
        return Spread.of([one.samples_per_s for one in self.served])

    @property
    def cpu_ratio(self) -> float:
        """CPU seconds a sample of the loop over the server's: what other programs do not touch."""
        loop = sum(one.cpu_s for one in self.looped) / sum(one.samples for one in self.looped)
        server = sum(one.server_cpu_s for one in self.served)
        return loop * sum(one.samples for one in self.served) / server if server else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "load": str(self.load),
            "steps": self.steps,
            "ratio": self.ratio.to_json(),
            "cpu_ratio": self.cpu_ratio,
            "server_samples_per_s": self.served_rate.to_json(),
            "loop_samples_per_s": Spread.of([s.samples_per_s for s in self.looped]).to_json(),
            "loop_samples_per_s_client_batch": self.looped_small.samples_per_s,
            "server_busy_share": Spread.of(
                [s.server_cpu_s / s.seconds for s in self.served]
            ).to_json(),
            "client_cpu_share": Spread.of([s.client_share for s in self.served]).to_json(),
            "waits": sum(s.waits for s in self.served),
            "steps_sent_again": sum(s.lost for s in self.served),
        }


def steps_for(load: Load, samples_per_s: float, seconds: float) -> int:
    """Steps of each client that take about ``seconds``, two at least."""
    return max(_LEAST_STEPS, round(seconds * samples_per_s / load.samples))


def measure_throughput(stand: Testbed, advance: Advance) -> list[Throughput]:
    """Every load of the plan, the loop and the server in turn."""
    return [_measure(stand, load, advance) for load in stand.setting.plan.loads]


def _measure(stand: Testbed, load: Load, advance: Advance) -> Throughput:
    plan = stand.setting.plan
    rate = stand.loop_over(load.samples, 1).samples_per_s  # also warms it up
    steps = steps_for(load, rate, plan.seconds)
    stand.serve(load, steps)  # a whole repetition, until its memory has grown as far as it will
    advance(f"throughput {load}")
    served, looped = [], [stand.loop_over(load.samples, steps)]
    for _ in range(plan.repetitions):
        served.append(stand.serve(load, steps))
        looped.append(stand.loop_over(load.samples, steps))
        advance(f"throughput {load}")
    small = stand.loop_over(load.batch, max(1, round(plan.seconds * rate / load.batch / 2)))
    return Throughput(load, steps, served, looped, small)


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


def measure_curve(stand: Testbed, advance: Callable[[str], None]) -> list[Point]:
    """Every point of the plan, on two servers that take turns."""
    settings = stand.setting.place | WITHOUT_BATCHING
    with hosted("server-alone", stand.folder, stand.cores, settings) as alone:
        other = (alone, alone.open_run(stand.setting.run))
        return [
            _measure_curve(stand, load, other, advance) for load in points_of(stand.setting.plan)
        ]


def _measure_curve(
    stand: Testbed, load: Load, other: tuple[ServerProcess, OpenRun], advance: Callable[[str], None]
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
