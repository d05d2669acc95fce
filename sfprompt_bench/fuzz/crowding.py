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

_CROWD_S: Final = 600.0  # it is stopped before

_BATCH: Final = 8


@dataclass(frozen=True)
class _Steps:
    """The measured steps of a device, alone or beside a crowd."""

    median_s: float
    worst_s: float


def measure_crowds(
    target: Target, count: int, seconds: float, folder: Path, report: Report
) -> None:
    """Compare a device's step time with and without idle and slow connections from its address.

    Args:
        target: the server.
        count: of connections.
        seconds: of each measurement.
        folder: of logs.
        report: gets a note for each crowd, and a finding if the step time exceeds `MAX_RATIO`.
    """
    before = _measure(target, seconds)
    for behaviour in ("idle", "slow"):
        with _crowd(target, count, behaviour, folder):
            time.sleep(_ARRIVE_S)
            crowded = _measure(target, seconds)
        after = _measure(target, seconds)
        alone_s = (before.median_s + after.median_s) / 2  # the machine may have other work
        ratio = crowded.median_s / alone_s
        before = after
        report.notes.append(
            f"{count:,} {behaviour} connections from one address: a device's step takes "
            f"{1000 * crowded.median_s:.1f} ms (median; longest {1000 * crowded.worst_s:.0f}), "
            f"alone {1000 * alone_s:.1f}: {ratio:.2f} times"
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
    end = time.monotonic() + seconds
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
    return _Steps(statistics.median(times), max(times))


@contextmanager
def _crowd(target: Target, count: int, behaviour: str, folder: Path) -> Iterator[None]:
    """Keep a crowd connected while the block runs."""
    arguments = [str(target.address[1]), str(count), behaviour, str(_CROWD_S)]
    process = Process(behaviour, ["sfprompt_bench.fuzz.crowd", *arguments], folder)
    try:
        yield
    finally:
        process.stop()
