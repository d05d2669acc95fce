"""What came of one method at one point: a value for each seed, their mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfprompt_bench.compare.config import Values, point_name
from sfprompt_bench.compare.plan import Job
from sfprompt_bench.compare.tasks import Failure, Figures

# In the order of files. Bytes are of one device; the first six are calculated ones of `estimate`.
FIELDS = (
    "trainable_parameters",
    "bytes_start",
    "bytes_up_per_round",
    "bytes_down_per_round",
    "device_flops_per_round",
    "device_peak_bytes",
    "accuracy",
    "accuracy_worst_client",
    "accuracy_proxy",
    "bytes_total",
    "bytes_to_target",
    "bytes_all_devices",
    "device_flops_total",
    "device_seconds",
    "server_seconds",
    "server_peak_bytes",
    "seconds",
    "epsilon",
)


@dataclass(frozen=True)
class Outcome:
    """One row of the tables.

    Attributes:
        method: its name.
        what: it in a sentence.
        point: of the sweep; empty without one.
        seeds: those that were done.
        figures: one for each of these seeds.
        failures: what went wrong, a text for each seed that failed.
    """

    method: str
    what: str
    point: Values = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    figures: tuple[Figures, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method, and the point where there is a sweep."""
        return f"{self.method} ({point_name(self.point)})" if self.point else self.method

    def mean(self, name: str) -> float | None:
        """Over the seeds; None where a seed has no such value."""
        values = self._values(name)
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        """Standard deviation over the seeds, 0 for one; None where there is no mean."""
        values = self._values(name)
        if not values:
            return None
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def phase_bytes(self) -> dict[str, dict[str, float]]:
        """Bytes of one device by phase and direction, mean over the seeds."""
        phases = {phase for one in self.figures for phase in one["bytes"]}
        return {
            phase: {
                way: statistics.fmean(
                    one["bytes"].get(phase, {}).get(way, 0) for one in self.figures
                )
                for way in ("up", "down")
            }
            for phase in sorted(phases)
        }

    def clients(self) -> dict[str, float]:
        """Accuracy on each device's held-out samples, mean over the seeds."""
        names = sorted({name for one in self.figures for name in one["accuracy_clients"]})
        return {
            name: statistics.fmean(
                one["accuracy_clients"][name]
                for one in self.figures
                if name in one["accuracy_clients"]
            )
            for name in names
        }

    def curve(self) -> list[dict[str, float]]:
        """Round, bytes of one device so far and accuracy, where every seed measured it."""
        if not self.figures:
            return []
        every = zip(*(one["curve"] for one in self.figures), strict=False)
        return [
            {
                name: statistics.fmean(point[name] for point in found)
                for name in ("round", "bytes", "accuracy")
            }
            for found in every
            if all(point["accuracy"] is not None for point in found)
        ]

    def calculated(self) -> dict[str, Any] | None:
        """The calculator's figures of the first seed's run."""
        found: dict[str, Any] | None = self.figures[0]["calculated"] if self.figures else None
        return found

    def _values(self, name: str) -> list[float]:
        values = [one.get(name) for one in self.figures]
        known = [float(value) for value in values if value is not None]
        return known if len(known) == len(values) else []


def outcomes_of(
    jobs: Sequence[Job], done: Mapping[str, Figures | Failure], target: float | None
) -> list[Outcome]:
    """An outcome for each method at each point, in the order of the jobs."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.method.name, point_name(job.point)), []).append(job)
    outcomes = []
    for members in groups.values():
        seeds, figures, failures = [], [], []
        for job in members:
            found = done[job.task.key]
            if isinstance(found, Exception):
                failures.append(f"seed {job.seed}: {found}")
            else:
                seeds.append(job.seed)
                figures.append(found | {"bytes_to_target": bytes_to_target(found, target)})
        first = members[0]
        outcomes.append(
            Outcome(
                first.method.name,
                first.method.what,
                first.point,
                tuple(seeds),
                tuple(figures),
                tuple(failures),
            )
        )
    return outcomes


def bytes_to_target(figures: Figures, target: float | None) -> int | None:
    """Bytes of one device up to the first measured round that reaches the target accuracy."""
    if target is None:
        return None
    for point in figures["curve"]:
        if point["accuracy"] is not None and point["accuracy"] >= target:
            moved: int = point["bytes"]
            return moved
    return None
