"""The description from which schemathesis makes requests, on a machine that lacks schemathesis."""

from sfprompt_bench.fuzz.openapi import describe_routes
from split_server.http.rights import RIGHTS


def test_the_description_has_every_route_of_the_federation_plane() -> None:
    described = {
        (method.upper(), path)
        for path, methods in describe_routes()["paths"].items()
        for method in methods
    }
    federation = {(right.method, right.path) for right in RIGHTS if "/split/" not in right.path}
    assert described == federation - {("GET", "/metrics"), ("GET", "/v1/runs/{run}/stream")}
