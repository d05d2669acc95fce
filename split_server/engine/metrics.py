"""What the engine does, in numbers: for Prometheus, and of each run for its history."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

WORK: Final = ("forward", "backward", "recompute", "inference")

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class RunFigures:
    """What the engine did for one run so far.

    Attributes:
        tasks: forwards and backwards.
        samples: that passed through the body, each way once.
        batch_samples: of the batches that these tasks were in, summed over tasks: divided by
            ``tasks`` the size of the batch that a task found itself in.
        recomputed: samples whose forward was run again for their backward.
        wait_s: from a task's coming to its turn, summed over tasks.
        compute_s: its share, by samples, of the time of its batches.
    """

    tasks: int = 0
    samples: int = 0
    batch_samples: int = 0
    recomputed: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """For a run's history: means where a sum says little."""
        tasks = max(1, self.tasks)
        return {
            "tasks": self.tasks,
            "samples": self.samples,
            "batch_samples": round(self.batch_samples / tasks, 2),
            "recomputed": self.recomputed,
            "wait_ms": round(1000 * self.wait_s / tasks, 3),
            "compute_s": round(self.compute_s, 3),
        }


@dataclass(frozen=True)
class Turn:
    """One task's turn in a batch."""

    run: str
    samples: int
    waited_s: float


@dataclass(frozen=True)
class _OfWork:
    """What is counted of one kind of batch."""

    fill: Histogram
    compute: Histogram
    wait: Histogram


class EngineFigures:
    """Counts what the engine does. Safe from any thread.

    Args:
        registry: that Prometheus reads; one for each server.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._lock = threading.Lock()
        self._runs: dict[str, RunFigures] = {}
        self._over: set[str] = set()  # runs whose last batch may still be at work
        self._samples = Counter(
            "sfprompt_engine_samples",
            "Samples that passed through a body, by run and pass",
            ["run", "work"],
            registry=self.registry,
        )
        fill = Histogram(
            "sfprompt_engine_batch_samples",
            "Samples of a batch",
            ["work"],
            buckets=_SAMPLES,
            registry=self.registry,
        )
        compute = Histogram(
            "sfprompt_engine_compute_seconds",
            "Time of a batch in its body",
            ["work"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        wait = Histogram(
            "sfprompt_engine_wait_seconds",
            "Time of a task in the queue",
            ["work"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        # Found once: to look a series up by its labels takes longer than to count in it.
        self._of_work = {
            work: _OfWork(fill.labels(work), compute.labels(work), wait.labels(work))
            for work in WORK
        }
        self._refused = Counter(
            "sfprompt_engine_refused",
            "Jobs that were refused or failed, by the code of their error",
            ["code"],
            registry=self.registry,
        )

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Show a value that is read whenever somebody looks."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def ran(self, work: str, turns: list[Turn], seconds: float) -> None:
        """A batch has been computed."""
        samples = sum(turn.samples for turn in turns)
        own = self._of_work[work]
        own.fill.observe(samples)
        own.compute.observe(seconds)
        for turn in turns:
            own.wait.observe(turn.waited_s)
            if turn.run in self._over:
                continue
            self._samples.labels(turn.run, work).inc(turn.samples)
            self._add(turn, samples, seconds * turn.samples / max(1, samples), work)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def of_run(self, run: str) -> RunFigures:
        """What was done for one run."""
        with self._lock:
            return self._runs.get(run, RunFigures())

    def forget(self, run: str) -> None:
        """A run is over: its numbers are in its history."""
        with self._lock:
            self._over.add(run)
            self._runs.pop(run, None)
        for work in WORK:
            self._samples.remove(run, work)

    def _add(self, turn: Turn, batch: int, seconds: float, work: str) -> None:
        with self._lock:
            so_far = self._runs.get(turn.run, RunFigures())
            self._runs[turn.run] = replace(
                so_far,
                tasks=so_far.tasks + 1,
                samples=so_far.samples + turn.samples,
                batch_samples=so_far.batch_samples + batch,
                recomputed=so_far.recomputed + (turn.samples if work == "recompute" else 0),
                wait_s=so_far.wait_s + turn.waited_s,
                compute_s=so_far.compute_s + seconds,
            )
