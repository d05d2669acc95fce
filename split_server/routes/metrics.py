"""The server in numbers, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import Response


def metrics_router(registry: CollectorRegistry) -> APIRouter:
    """``GET /metrics``. It names runs, as ``GET /v1/runs`` does, and nothing that they hold."""
    router = APIRouter()

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
