"""Samples a second through the server, over those of a plain loop with the same body."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sfprompt_bench.engine.spread import Spread
from sfprompt_bench.engine.testbed import Looped, Served, Testbed
from sfprompt_bench.engine.workload import Load

Advance = Callable[[str], None]  # called after each measurement, with its name

_MIN_STEPS = 2


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
