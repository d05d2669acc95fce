"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.responses import Response

from protocol.traffic import Traffic
from split_server.engine.metrics import RunFigures


def metrics_router(registry: CollectorRegistry) -> APIRouter:
    """Create the route ``GET /metrics``, for the operator."""
    router = APIRouter()

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


_BY_RUN: dict[str, tuple[str, Callable[[RunFigures], float]]] = {
    "tasks": ("Forwards and backwards", lambda run: run.tasks),
    "batch_samples": ("Samples in the batches of its tasks", lambda run: run.batch_samples),
    "recomputed_samples": ("Samples whose forward ran twice", lambda run: run.recomputed),
    "wait_seconds": ("Time of its tasks in the queue", lambda run: run.wait_s),
    "compute_seconds": ("Its share of its batches' compute time", lambda run: run.compute_s),
}


class RunCollector(Collector):
    """Collects the work of the engine and the bytes at the socket for each run.

    Args:
        open_runs: returns the ids of the open runs.
        figures: returns what the engine has computed for a run.
        traffic: returns the traffic of a run's participants.
        refusals: returns how many updates of a run were refused.
    """

    def __init__(
        self,
        open_runs: Callable[[], Iterable[str]],
        figures: Callable[[str], RunFigures],
        traffic: Callable[[str], Traffic],
        refusals: Callable[[str], int],
    ) -> None:
        self._open_runs = open_runs
        self._figures = figures
        self._traffic = traffic
        self._refusals = refusals

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Return nothing: the names are known with the values."""
        return iter(())

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield one counter family for each quantity, labelled by run."""
        runs = list(self._open_runs())
        for name, (help_text, read) in _BY_RUN.items():
            family = CounterMetricFamily(f"sfprompt_engine_run_{name}", help_text, labels=["run"])
            for run in runs:
                family.add_metric([run], read(self._figures(run)))
            yield family
        family = CounterMetricFamily("sfprompt_updates_refused", "Refused updates", labels=["run"])
        for run in runs:
            family.add_metric([run], self._refusals(run))
        yield family
        labels = ["run", "phase", "direction"]
        family = CounterMetricFamily("sfprompt_wire_bytes", "Bytes at the socket", labels=labels)
        for run in runs:
            for phase, directions in self._traffic(run).to_dict().items():
                for direction, nbytes in directions.items():
                    family.add_metric([run, phase, direction], nbytes)
        yield family
