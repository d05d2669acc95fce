"""The server in numbers, for Prometheus."""

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
    """``GET /metrics``. It names runs, as ``GET /v1/runs`` does, and nothing that they hold."""
    router = APIRouter()

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


_BY_RUN: dict[str, tuple[str, Callable[[RunFigures], float]]] = {
    "tasks": ("Forwards and backwards", lambda run: run.tasks),
    "batch_samples": ("Samples of the batches that its tasks were in", lambda r: r.batch_samples),
    "recomputed_samples": ("Samples whose forward was run twice", lambda run: run.recomputed),
    "wait_seconds": ("From a task's coming to its turn", lambda run: run.wait_s),
    "compute_seconds": ("Its share of its batches' time", lambda run: run.compute_s),
}


class RunCollector(Collector):
    """The engine's work and the bytes at the socket, by run.

    Args:
        open_runs: their names.
        figures: of a run.
        traffic: of a run's participants.
    """

    def __init__(
        self,
        open_runs: Callable[[], Iterable[str]],
        figures: Callable[[str], RunFigures],
        traffic: Callable[[str], Traffic],
    ) -> None:
        self._open_runs = open_runs
        self._figures = figures
        self._traffic = traffic

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Nothing: names are told with the values."""
        return iter(())

    def collect(self) -> Iterator[CounterMetricFamily]:
        runs = list(self._open_runs())
        for name, (what, read) in _BY_RUN.items():
            found = CounterMetricFamily(f"sfprompt_engine_run_{name}", what, labels=["run"])
            for run in runs:
                found.add_metric([run], read(self._figures(run)))
            yield found
        labels = ["run", "phase", "direction"]
        found = CounterMetricFamily("sfprompt_wire_bytes", "Bytes at the socket", labels=labels)
        for run in runs:
            for phase, ways in self._traffic(run).to_dict().items():
                for way, nbytes in ways.items():
                    found.add_metric([run, phase, way], nbytes)
        yield found
