"""Which requests are exempt from the JSON body limit: those of the update route only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from starlette.types import Scope

from split_server.http.federation_routes import FederationRoutes
from split_server.http.services import Services


def request(method: str, path: str) -> Scope:
    return {"type": "http", "method": method, "path": path}


@pytest.mark.parametrize(
    ("method", "path", "is_exempt"),
    [
        ("PUT", "/v1/runs/r1/update", True),
        ("POST", "/v1/runs/r1/update", False),
        ("PUT", "/v1/runs/r1/evaluation", False),
        ("PUT", "/v1/runs/r1/x/update", False),
        ("POST", "/elsewhere/update", False),
    ],
)
def test_only_the_update_route_limits_its_body_itself(
    method: str, path: str, is_exempt: bool
) -> None:
    services = cast(Services, SimpleNamespace(federation=None, reader=None, runs=None))
    routes = FederationRoutes(services)
    assert routes.limits_body_itself(request(method, path)) is is_exempt
