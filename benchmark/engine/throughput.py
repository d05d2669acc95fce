"""Samples a second through the server, against a plain loop over the same body."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.engine.setting import Load
from benchmark.engine.spread import Spread
from benchmark.engine.stand import Looped, Served, Stand

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


def measure_throughput(stand: Stand, advance: Advance) -> list[Throughput]:
    """Every load of the plan, the loop and the server in turn."""
    return [_measure(stand, load, advance) for load in stand.setting.plan.loads]


def _measure(stand: Stand, load: Load, advance: Advance) -> Throughput:
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
