"""The step time of a device while a crowd of connections is there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sfprompt_bench.engine.synthetic_device import SyntheticDevice
from sfprompt_bench.engine.workload import shape_of
from sfprompt_bench.fuzz.findings import Report
from sfprompt_bench.fuzz.target import Target
from sfprompt_bench.run.processes import Process

MAX_RATIO: Final = 1.5

_ARRIVE_S: Final = 3.0  # until the crowd is there

_LEAVE_S: Final = 1.0  # until the server has closed its connections

_REPEATS: Final = 3

_CROWD_S: Final = 600.0  # it is stopped before

_BATCH: Final = 8


@dataclass(frozen=True)
class _Steps:
    """The measured steps of a device, alone or beside a crowd.

    Attributes:
        median_s: time of a step.
        worst_s: time of the longest step.
        cpu_s: processor time of the server for each step, that for the crowd included.
    """

    median_s: float
    worst_s: float
    cpu_s: float


def measure_crowds(
    target: Target, count: int, seconds: float, folder: Path, report: Report
) -> None:
    """Compare a device's step time with and without idle and slow connections from its address.

    Each crowd comes and goes several times, between measurements without it: the machine may have
    other work, which changes slower than that.

    Args:
        target: the server.
        count: of connections.
        seconds: of each measurement.
        folder: of logs.
        report: gets a note for each crowd, and a finding if the step time exceeds `MAX_RATIO`.
    """
    for behaviour in ("idle", "slow"):
        alone = [_measure(target, seconds)]
        crowded: list[_Steps] = []
        for _ in range(_REPEATS):
            with _crowd(target, count, behaviour, folder):
                time.sleep(_ARRIVE_S)
                crowded.append(_measure(target, seconds))
            time.sleep(_LEAVE_S)
            alone.append(_measure(target, seconds))
        _report(count, behaviour, alone, crowded, report)


def _report(
    count: int, behaviour: str, alone: list[_Steps], crowded: list[_Steps], report: Report
) -> None:
    """Note the ratio of each crowd to the measurements before and after it."""
    ratios = [
        2 * each.median_s / (before.median_s + after.median_s)
        for before, each, after in zip(alone, crowded, alone[1:], strict=False)
    ]
    ratio = statistics.median(ratios)
    cpu, cpu_alone = (
        1000 * statistics.median(each.cpu_s for each in steps) for steps in (crowded, alone)
    )
    report.notes.append(
        f"{count:,} {behaviour} connections from one address: a device's step takes "
        f"{1000 * statistics.median(each.median_s for each in crowded):.1f} ms (longest "
        f"{1000 * max(each.worst_s for each in crowded):.0f}), alone "
        f"{1000 * statistics.median(each.median_s for each in alone):.1f}: {ratio:.2f} times "
        f"(median of {len(ratios)}, from {min(ratios):.2f} to {max(ratios):.2f}); the server's "
        f"processor time for a step {cpu:.1f} ms, alone {cpu_alone:.1f}"
    )
    if ratio > MAX_RATIO:
        report.add(0, f"{count} {behaviour} connections", f"a step takes {ratio:.2f} times")


def _measure(target: Target, seconds: float) -> _Steps:
    """Run steps of one device, over a new connection every second."""
    run = target.runs[0]
    host, port = target.address
    shape = shape_of(run.plan.model, _BATCH)
    device = SyntheticDevice(host, port, run.credentials[0], shape, seed=0)
    times: list[float] = []
    end, cpu_s = time.monotonic() + seconds, target.cpu_s()
    with closing(device):
        while time.monotonic() < end:
            began = time.perf_counter()
            device.connect()
            reconnect = time.monotonic() + 1
            while time.monotonic() < reconnect:
                device.step(1)
                times.append(time.perf_counter() - began)
                began = time.perf_counter()
            device.close()
    used_s = target.cpu_s() - cpu_s
    return _Steps(statistics.median(times), max(times), used_s / len(times))


@contextmanager
def _crowd(target: Target, count: int, behaviour: str, folder: Path) -> Iterator[None]:
    """Keep a crowd connected while the block runs."""
    arguments = [str(target.address[1]), str(count), behaviour, str(_CROWD_S)]
    process = Process(behaviour, ["sfprompt_bench.fuzz.crowd", *arguments], folder)
    try:
        yield
    finally:
        process.stop()
