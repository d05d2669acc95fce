"""Many clients on one server for a long time: memory, step times, and whether anybody starves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from protocol.errors import SFPromptError
from sfprompt_bench.engine.stand import Testbed, work_of
from sfprompt_bench.engine.workload import Load, quantile

_WARM_UP = 0.2  # share of the time

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Soak:
    """What was seen.

    Attributes:
        load: the clients and their batch.
        seconds: how long it took.
        memory: seconds from the start and resident bytes of the server.
        ends: for each client, when its steps ended, in seconds from the start.
        lengths: for each client, the seconds of its steps.
        warm_up_s: what came before this counts for fairness alone.
        waits, lost: answers "busy", and steps that were sent again.
        client_share: CPU of all clients together, of one core.
    """

    load: Load
    seconds: float
    memory: Sequence[tuple[float, int]]
    ends: Sequence[Sequence[float]]
    lengths: Sequence[Sequence[float]]
    warm_up_s: float
    waits: int
    lost: int
    client_share: float

    @property
    def fairness(self) -> float:
        """Steps of the slowest client over those of the fastest."""
        done = [len(one) for one in self.ends]
        return min(done) / max(done)

    @property
    def settled(self) -> list[float]:
        """Seconds of all steps that ended after the warm-up."""
        return [
            length
            for ends, lengths in zip(self.ends, self.lengths, strict=True)
            for end, length in zip(ends, lengths, strict=True)
            if end >= self.warm_up_s
        ]

    @property
    def p99_vs_median(self) -> float:
        return quantile(self.settled, 0.99) / statistics.median(self.settled)

    @property
    def settled_memory(self) -> list[int]:
        """Resident bytes after the warm-up."""
        return [nbytes for second, nbytes in self.memory if second >= self.warm_up_s]

    @property
    def memory_drift(self) -> float:
        """The largest distance from the median of the resident memory, after the warm-up."""
        middle = statistics.median(self.settled_memory)
        return max(abs(nbytes - middle) for nbytes in self.settled_memory) / middle

    def to_json(self) -> dict[str, Any]:
        done = [len(one) for one in self.ends]
        return {
            "clients": self.load.clients,
            "batch": self.load.batch,
            "seconds": self.seconds,
            "samples_per_s": sum(done) * self.load.batch / self.seconds,
            "fairness": self.fairness,
            "steps_least": min(done),
            "steps_most": max(done),
            "step_s_median": statistics.median(self.settled),
            "step_s_p99": quantile(self.settled, 0.99),
            "p99_vs_median": self.p99_vs_median,
            "memory_drift": self.memory_drift,
            "memory_mib_median": statistics.median(self.settled_memory) / _MIB,
            "memory_mib": [[round(at, 1), round(size / _MIB, 1)] for at, size in self.memory],
            "warm_up_s": self.warm_up_s,
            "waits": self.waits,
            "steps_sent_again": self.lost,
            "client_cpu_share": self.client_share,
        }


def measure_soak(stand: Testbed, tick: Callable[[float], None]) -> Soak:
    """Let all clients work for the plan's time; ``tick`` is told the seconds that have passed.

    Raises:
        SFPromptError: not even two steps of a client fitted in that time.
    """
    plan, server = stand.setting.plan, stand.server
    asked = work_of(server, stand.run, plan.soak)
    stand.crowd.begin("work", **asked, seconds=plan.soak_s)
    began, memory = time.perf_counter(), []
    while True:
        passed = time.perf_counter() - began
        memory.append((passed, server.resident_bytes()))
        tick(passed)
        if stand.crowd.is_done(min(1.0, plan.soak_s / 20)):
            break
    found = stand.crowd.end()
    return _seen(found, plan.soak, [one for one in memory if one[0] <= plan.soak_s])


def _seen(found: dict[str, Any], load: Load, memory: Sequence[tuple[float, int]]) -> Soak:
    devices = found["devices"]
    seconds = float(found["seconds"])
    soak = Soak(
        load=load,
        seconds=seconds,
        memory=memory,
        ends=[one["ends"] for one in devices],
        lengths=[one["seconds"] for one in devices],
        warm_up_s=_WARM_UP * seconds,
        waits=sum(one["waits"] for one in devices),
        lost=sum(one["lost"] for one in devices),
        client_share=found["cpu_s"] / seconds,
    )
    if not soak.settled_memory:
        soak = replace(soak, memory=[(seconds, memory[-1][1])])
    if len(soak.settled) < load.clients:
        raise SFPromptError(
            "the soak is too short: the clients did less than a step each",
            field="minutes",
            value=seconds / 60,
            hint="give it more --minutes",
        )
    return soak
