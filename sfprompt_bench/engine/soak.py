"""Many clients on one server for a long time: memory, step times and fairness."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from protocol.errors import SFPromptError
from sfprompt_bench.engine.testbed import Testbed, step_arguments
from sfprompt_bench.engine.workload import Load, quantile

_WARM_UP = 0.2  # share of the soak

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Soak:
    """The measurements of a soak.

    Attributes:
        load: the clients and their batch.
        seconds: of the soak.
        memory: pairs of seconds from the start and resident bytes of the server.
        ends: for each client, when its steps ended, in seconds from the start.
        lengths: for each client, the seconds of its steps.
        warm_up_s: measurements before this time count for fairness alone.
        waits, lost: ``busy`` responses, and steps that were repeated.
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
        done = [len(ends) for ends in self.ends]
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
        """The largest deviation of the resident memory from its median, after the warm-up."""
        median = statistics.median(self.settled_memory)
        return max(abs(nbytes - median) for nbytes in self.settled_memory) / median

    def to_json(self) -> dict[str, Any]:
        done = [len(ends) for ends in self.ends]
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


def measure_soak(testbed: Testbed, tick: Callable[[float], None]) -> Soak:
    """Run all clients for the plan's time; call ``tick`` with the seconds that have passed.

    Raises:
        SFPromptError: a client had no time for a step after the warm-up.
    """
    plan, server, clients = testbed.setting.plan, testbed.server, testbed.clients
    arguments = step_arguments(server, testbed.run, plan.soak)
    clients.begin("run_steps", **arguments, seconds=plan.soak_s)
    began, memory = time.perf_counter(), []
    while True:
        passed = time.perf_counter() - began
        memory.append((passed, server.resident_bytes()))
        tick(passed)
        if clients.is_done(min(1.0, plan.soak_s / 20)):
            break
    result = clients.end()
    return _soak(result, plan.soak, [entry for entry in memory if entry[0] <= plan.soak_s])


def _soak(result: dict[str, Any], load: Load, memory: Sequence[tuple[float, int]]) -> Soak:
    devices = result["devices"]
    seconds = float(result["seconds"])
    soak = Soak(
        load=load,
        seconds=seconds,
        memory=memory,
        ends=[device["ends"] for device in devices],
        lengths=[device["seconds"] for device in devices],
        warm_up_s=_WARM_UP * seconds,
        waits=sum(device["waits"] for device in devices),
        lost=sum(device["lost"] for device in devices),
        client_share=result["cpu_s"] / seconds,
    )
    if not soak.settled_memory:
        soak = replace(soak, memory=[(seconds, memory[-1][1])])
    if len(soak.settled) < load.clients:
        raise SFPromptError(
            "the soak is too short: the clients have fewer steps than one each after the warm-up",
            field="minutes",
            value=seconds / 60,
            hint="raise --minutes",
        )
    return soak
