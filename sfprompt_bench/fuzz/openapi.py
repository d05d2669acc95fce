"""Requests that schemathesis makes from the server's OpenAPI description."""

from __future__ import annotations

import importlib.util
import json
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from fastapi import FastAPI

from protocol.errors import SFPromptError
from sfprompt_bench.fuzz.target import Request, Target
from split_server.http.federation_routes import FederationRoutes
from split_server.http.operator_routes import OperatorRoutes
from split_server.page.routes import PageRoutes

if TYPE_CHECKING:
    from split_server.http.services import Services

BATCH: Final = 25  # requests of one seed: one operation's


class OpenApi:
    """The operations of the federation plane.

    Args:
        target: gets the requests.
    """

    def __init__(self, target: Target) -> None:
        import schemathesis

        description = describe_routes()
        schema = schemathesis.openapi.from_dict(description)
        self._operations = [result.ok() for result in schema.get_all_operations()]
        self._target = target

    @staticmethod
    def is_installed() -> bool:
        """Whether schemathesis is here."""
        return importlib.util.find_spec("schemathesis") is not None

    def send(self, seed: int, send: Callable[[Request], None]) -> str:
        """Make a batch of requests to one operation, valid ones or invalid ones, and send them.

        Returns:
            The operation.
        """
        import hypothesis
        from schemathesis import GenerationMode

        operation = self._operations[seed // 2 % len(self._operations)]
        mode = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[seed % 2]
        headers = self._headers(seed)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            send(_request_of(case, headers, self._run(seed)))

        try:
            run()
        except hypothesis.errors.Unsatisfiable:  # nothing that one could send is invalid
            return f"{operation.method} {operation.path}: nothing to send"
        except SFPromptError as error:
            return f"{operation.method} {operation.path}: {error}"
        return f"{operation.method} {operation.path}"

    def _run(self, seed: int) -> str:
        runs = self._target.runs
        return runs[seed % len(runs)].id

    def _headers(self, seed: int) -> dict[str, str]:
        """Return the headers of a participant; a quarter of the batches is the operator's."""
        credentials = self._target.runs[seed % len(self._target.runs)].credentials
        token = self._target.operator_token if seed % 8 < 2 else credentials[0]
        return {"sfprompt-version": "2", "authorization": f"Bearer {token}"}


def describe_routes() -> dict[str, Any]:
    """Return the OpenAPI description of the server's routes, which it does not serve itself."""
    app = FastAPI()
    services = cast("Services", _NoServices())
    for routes in (FederationRoutes, OperatorRoutes, PageRoutes):
        app.include_router(routes(services).router)
    description = app.openapi()
    del description["paths"]["/v1/runs/{run}/stream"]  # it ends with the run
    return description


class _NoServices:
    """Stands for the server's services, which no description needs."""

    def __getattr__(self, name: str) -> None:
        return None


def _request_of(case: Any, headers: dict[str, str], run: str) -> Request:
    """Write a case of schemathesis for the wire; half of those with a run name a real one."""
    path = str(case.formatted_path)
    parts = path.split("/")
    is_creation = path == "/v1/runs"
    if len(parts) > 4 and len(parts[3]) % 2 and parts[-1] not in ("cancel", "me", "pause"):
        parts[3] = run
        path = "/".join(parts)
    query = {name: _text(value) for name, value in dict(case.query or {}).items()}
    if query:
        path += "?" + urllib.parse.urlencode(query, errors="replace")
    own = {
        str(name): _text(value).replace("\r", "").replace("\n", "")
        for name, value in dict(case.headers or {}).items()
    }
    if is_creation:  # what the operator may create takes minutes: a participant may not
        headers = {name: value for name, value in headers.items() if name != "authorization"}
    if case.media_type is None:
        return Request(case.method.upper(), path, {**own, **headers})
    body = case.body
    data = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
    own["content-type"] = "application/json"
    return Request(case.method.upper(), path, {**own, **headers}, data)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
