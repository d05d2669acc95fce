"""The outcome of one method at one point of a sweep: figures for each seed, mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfprompt_bench.compare.config import Values, point_name
from sfprompt_bench.compare.plan import Job
from sfprompt_bench.compare.tasks import Failure, Figures

# In the order of files. Bytes are of one device; `estimate` calculates the first six.
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
        what: the method in a sentence.
        point: of the sweep; empty without one.
        seeds: those with figures.
        figures: one for each of these seeds.
        failures: an error message for each seed that failed.
    """

    method: str
    what: str
    point: Values = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    figures: tuple[Figures, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method, and the point of the sweep if there is one."""
        return f"{self.method} ({point_name(self.point)})" if self.point else self.method

    def mean(self, name: str) -> float | None:
        """Average a figure over the seeds; None if a seed lacks it."""
        values = self._values(name)
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        """Standard deviation over the seeds, 0 for a single seed; None if there is no mean."""
        values = self._values(name)
        if not values:
            return None
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def phase_bytes(self) -> dict[str, dict[str, float]]:
        """Bytes of one device by phase and direction, mean over the seeds."""
        phases = {phase for figures in self.figures for phase in figures["bytes"]}
        return {
            phase: {
                direction: statistics.fmean(
                    figures["bytes"].get(phase, {}).get(direction, 0) for figures in self.figures
                )
                for direction in ("up", "down")
            }
            for phase in sorted(phases)
        }

    def device_accuracies(self) -> dict[str, float]:
        """Accuracy on each device's held-out samples, mean over the seeds."""
        by_seed = [figures["accuracy_clients"] for figures in self.figures]
        names = sorted({name for accuracies in by_seed for name in accuracies})
        return {
            name: statistics.fmean(accuracies[name] for accuracies in by_seed if name in accuracies)
            for name in names
        }

    def curve(self) -> list[dict[str, float]]:
        """Round, bytes of one device so far and accuracy, of rounds that all seeds measured."""
        if not self.figures:
            return []
        return [
            {
                name: statistics.fmean(point[name] for point in points)
                for name in ("round", "bytes", "accuracy")
            }
            for points in zip(*(figures["curve"] for figures in self.figures), strict=False)
            if all(point["accuracy"] is not None for point in points)
        ]

    def calculated(self) -> dict[str, Any] | None:
        """The calculated cost of the first seed's run."""
        cost: dict[str, Any] | None = self.figures[0]["calculated"] if self.figures else None
        return cost

    def _values(self, name: str) -> list[float]:
        values = [figures.get(name) for figures in self.figures]
        known = [float(value) for value in values if value is not None]
        return known if len(known) == len(values) else []


def outcomes_of(
    jobs: Sequence[Job], results: Mapping[str, Figures | Failure], target: float | None
) -> list[Outcome]:
    """Group the tasks' results, by task key, into an outcome for each method at each point.

    Outcomes are in the order of the jobs. ``target`` is the accuracy up to which bytes count.
    """
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.method.name, point_name(job.point)), []).append(job)
    return [_outcome(group, results, target) for group in groups.values()]


def _outcome(
    jobs: Sequence[Job], results: Mapping[str, Figures | Failure], target: float | None
) -> Outcome:
    seeds, figures, failures = [], [], []
    for job in jobs:
        result = results[job.task.key]
        if isinstance(result, Exception):
            failures.append(f"seed {job.seed}: {result}")
        else:
            seeds.append(job.seed)
            figures.append(result | {"bytes_to_target": bytes_to_target(result, target)})
    method, point = jobs[0].method, jobs[0].point
    return Outcome(method.name, method.what, point, tuple(seeds), tuple(figures), tuple(failures))


def bytes_to_target(figures: Figures, target: float | None) -> int | None:
    """Bytes of one device up to the first measured round that reaches the target accuracy."""
    if target is None:
        return None
    for point in figures["curve"]:
        if point["accuracy"] is not None and point["accuracy"] >= target:
            nbytes: int = point["bytes"]
            return nbytes
    return None
