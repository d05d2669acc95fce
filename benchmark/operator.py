"""The few requests that a run's owner makes: create, watch, results, cancel."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import httpx

from protocol.errors import Unreachable, error_from_wire
from protocol.messages import Results, RunView, parse_message
from protocol.settings import RunSettings
from protocol.version import IDEMPOTENCY_HEADER, PROTOCOL_VERSION, VERSION_HEADER


class Operator:
    """The owner of runs, with the token that the server wrote into its data folder."""

    def __init__(self, url: str, token: str | None = None) -> None:
        headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        # No proxy of the environment: the server is where the address says.
        self._client = httpx.Client(base_url=url, headers=headers, timeout=300, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def is_healthy(self) -> bool:
        try:
            return self._client.get("/v1/health").status_code == 200
        except httpx.TransportError:
            return False

    def create_run(self, settings: RunSettings) -> RunView:
        """Create a run; the server prepares its backbone before it answers."""
        return parse_message(
            RunView, self._call("POST", "/v1/runs", settings.model_dump(mode="json"))
        )

    def results(self, run: str) -> Results:
        return parse_message(Results, self._call("GET", f"/v1/runs/{run}/results"))

    def cancel(self, run: str) -> None:
        self._call("POST", f"/v1/runs/{run}/cancel")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {IDEMPOTENCY_HEADER: uuid.uuid4().hex} if method == "POST" else {}
        try:
            response = self._client.request(method, path, json=body, headers=headers)
        except httpx.TransportError as error:
            raise Unreachable(
                f"the server does not answer: {error}",
                field="url",
                value=str(self._client.base_url),
            ) from error
        if response.is_error:
            try:
                wire: object = response.json()
            except ValueError:
                wire = None
            raise error_from_wire(wire, response.status_code)
        return response.json() if response.content else None


def device_bytes(results: Results, phases: Sequence[str] | None = None) -> int:
    """Bytes at the socket of all devices in both directions, of some phases or of all."""
    chosen = results.traffic if phases is None else phases
    return sum(sum(results.traffic.get(phase, {}).values()) for phase in chosen)
