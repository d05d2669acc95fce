"""Samples a second: through the server over a plain loop, and the gain of batching."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfprompt_bench.engine.server import OpenRun, ServerProcess, running_server
from sfprompt_bench.engine.testbed import Looped, Served, Testbed
from sfprompt_bench.engine.workload import Load, Plan, Spread

Advance = Callable[[str], None]  # called after each measurement, with its name

_MIN_STEPS = 2

WITHOUT_BATCHING = {"max_batch_samples": 1}

_COLUMNS = (
    *("clients", "batch", "samples_per_s", "samples_per_s_alone"),
    *("gain", "gain_least", "gain_most"),
)


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
                served.samples_per_s / statistics.fmean([before.samples_per_s, after.samples_per_s])
                for served, before, after in zip(
                    self.served, self.looped, self.looped[1:], strict=False
                )
            ]
        )

    @property
    def served_rate(self) -> Spread:
        """The server's samples a second."""
        return Spread.of([served.samples_per_s for served in self.served])

    @property
    def cpu_ratio(self) -> float:
        """CPU seconds a sample of the loop over the server's: other programs do not affect it."""
        loop = sum(s.cpu_s for s in self.looped) / sum(s.samples for s in self.looped)
        server = sum(s.server_cpu_s for s in self.served)
        return loop * sum(s.samples for s in self.served) / server if server else 0.0

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
    """Steps of each client that take about ``seconds``, at least two."""
    return max(_MIN_STEPS, round(seconds * samples_per_s / load.samples))


def measure_throughput(testbed: Testbed, advance: Advance) -> list[Throughput]:
    """Measure each load of the plan, the loop and the server in turn."""
    return [_measure(testbed, load, advance) for load in testbed.setting.plan.loads]


def _measure(testbed: Testbed, load: Load, advance: Advance) -> Throughput:
    plan = testbed.setting.plan
    rate = testbed.measure_loop(load.samples, 1).samples_per_s  # also warms the loop up
    steps = steps_for(load, rate, plan.seconds)
    testbed.measure_server(load, steps)  # a whole repetition, until the server's memory has grown
    advance(f"throughput {load}")
    served, looped = [], [testbed.measure_loop(load.samples, steps)]
    for _ in range(plan.repetitions):
        served.append(testbed.measure_server(load, steps))
        looped.append(testbed.measure_loop(load.samples, steps))
        advance(f"throughput {load}")
    small_steps = max(1, round(plan.seconds * rate / load.batch / 2))
    return Throughput(load, steps, served, looped, testbed.measure_loop(load.batch, small_steps))


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
        loads = curve_loads(setting.plan)
        return [_measure_point(testbed, load, unbatched, advance) for load in loads]


def _measure_point(
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
