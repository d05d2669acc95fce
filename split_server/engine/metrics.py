"""The engine's counters: for Prometheus, and for each run's history."""

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
    """What the engine has done for one run.

    Attributes:
        tasks: number of forwards and backwards.
        samples: number of samples through the body; forward and backward count separately.
        batch_samples: sum over tasks of the samples in the task's batch; divided by ``tasks``, the
            mean batch size that a task saw.
        recomputed: number of samples whose forward ran again for their backward.
        wait_s: seconds that tasks spent in the queue, summed over tasks.
        compute_s: seconds of the batches, each shared among its tasks by samples.
    """

    tasks: int = 0
    samples: int = 0
    batch_samples: int = 0
    recomputed: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Return the counters for a run's history, as means where a sum says little."""
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
    """One task's part of a batch, and its time in the queue."""

    run: str
    samples: int
    waited_s: float


@dataclass(frozen=True)
class _WorkHistograms:
    """The histograms of one kind of work."""

    fill: Histogram
    compute: Histogram
    wait: Histogram


class EngineFigures:
    """Counts what the engine does. Thread-safe.

    Args:
        registry: what Prometheus reads; one for each server.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._lock = threading.Lock()
        self._runs: dict[str, RunFigures] = {}
        self._finished: set[str] = set()  # runs whose last batch may still be running
        self._samples = Counter(
            "sfprompt_engine_samples",
            "Samples through a body, by run and kind of work",
            ["run", "work"],
            registry=self.registry,
        )
        fill = Histogram(
            "sfprompt_engine_batch_samples",
            "Samples per batch",
            ["work"],
            buckets=_SAMPLES,
            registry=self.registry,
        )
        compute = Histogram(
            "sfprompt_engine_compute_seconds",
            "Seconds of a batch in its body",
            ["work"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        wait = Histogram(
            "sfprompt_engine_wait_seconds",
            "Seconds of a task in the queue",
            ["work"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        # Looked up once: a lookup by labels takes longer than the count itself.
        self._histograms = {
            work: _WorkHistograms(fill.labels(work), compute.labels(work), wait.labels(work))
            for work in WORK
        }
        self._refused = Counter(
            "sfprompt_engine_refused",
            "Jobs that were refused or failed, by error code",
            ["code"],
            registry=self.registry,
        )

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value ``read`` returns at every scrape."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def count_batch(self, work: str, turns: list[Turn], seconds: float) -> None:
        """Count a computed batch."""
        samples = sum(turn.samples for turn in turns)
        histograms = self._histograms[work]
        histograms.fill.observe(samples)
        histograms.compute.observe(seconds)
        for turn in turns:
            histograms.wait.observe(turn.waited_s)
            if turn.run in self._finished:
                continue
            self._samples.labels(turn.run, work).inc(turn.samples)
            self._add(turn, samples, seconds * turn.samples / max(1, samples), work)

    def count_refusal(self, code: str) -> None:
        """Count a job that was refused or failed, by its error code."""
        self._refused.labels(code).inc()

    def of_run(self, run: str) -> RunFigures:
        """Return a run's counters."""
        with self._lock:
            return self._runs.get(run, RunFigures())

    def forget(self, run: str) -> None:
        """Drop a finished run's counters, which are in its history by now."""
        with self._lock:
            self._finished.add(run)
            self._runs.pop(run, None)
        for work in WORK:
            self._samples.remove(run, work)

    def _add(self, turn: Turn, batch: int, seconds: float, work: str) -> None:
        with self._lock:
            counted = self._runs.get(turn.run, RunFigures())
            self._runs[turn.run] = replace(
                counted,
                tasks=counted.tasks + 1,
                samples=counted.samples + turn.samples,
                batch_samples=counted.batch_samples + batch,
                recomputed=counted.recomputed + (turn.samples if work == "recompute" else 0),
                wait_s=counted.wait_s + turn.waited_s,
                compute_s=counted.compute_s + seconds,
            )
