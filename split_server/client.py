"""The operator's requests, for the command line and for those who start servers."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import httpx

from protocol.errors import InvalidField, NotFound, Unreachable, error_from_wire
from protocol.messages import Event, Results, RunView, parse_message
from protocol.plan import RunPlan
from protocol.tls import trusting
from protocol.wire import IDEMPOTENCY_HEADER, PROTOCOL_VERSION, VERSION_HEADER
from split_server.settings import OPERATOR_TOKEN_FILE

_TIMEOUT_S = 600.0


def read_token(data_dir: Path) -> str:
    """The operator token that a server wrote into its data folder.

    Raises:
        NotFound: there is none.
    """
    path = data_dir / OPERATOR_TOKEN_FILE
    try:
        return path.read_text().strip()
    except OSError:
        raise NotFound(
            "there is no operator token",
            field="data_dir",
            value=str(path),
            hint="give the server's --data-dir, or --operator-token",
        ) from None


class OperatorClient:
    """The owner of runs, with the operator token.

    Every request raises `Unreachable` or the server's typed error.

    Raises:
        InvalidField: the address or the file of trusted certificates is none.
    """

    def __init__(self, url: str, token: str | None = None, ca_file: Path | None = None) -> None:
        headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        if httpx.URL(url).scheme not in ("http", "https"):
            raise InvalidField(
                "an address begins with http:// or https://",
                field="url",
                value=url,
                hint="for example http://gpu-node:8500",
            )
        verify = trusting(ca_file) if ca_file else True
        # No proxy of the environment: the server is where the address says.
        self._client = httpx.Client(
            base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False, verify=verify
        )

    def close(self) -> None:
        self._client.close()

    def is_healthy(self) -> bool:
        try:
            return self._client.get("/v1/health").status_code == 200
        except httpx.TransportError:
            return False

    def create_run(self, settings: RunPlan) -> RunView:
        """Create a run; the server prepares its backbone first, however long that takes."""
        body = settings.model_dump(mode="json")
        return parse_message(RunView, self._call("POST", "/v1/runs", body, timeout_s=None))

    def runs(self) -> list[RunView]:
        return [parse_message(RunView, run) for run in self._call("GET", "/v1/runs")]

    def results(self, run: str) -> Results:
        return parse_message(Results, self._call("GET", f"/v1/runs/{run}/results"))

    def events(self, run: str, after: int, wait_s: float) -> list[Event]:
        """What has happened since event ``after``; waits up to ``wait_s`` for the first."""
        found = self._call("GET", f"/v1/runs/{run}/events?after={after}&wait={wait_s:g}")
        return [parse_message(Event, event) for event in found]

    def cancel(self, run: str) -> RunView:
        return parse_message(RunView, self._call("POST", f"/v1/runs/{run}/cancel"))

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float | None = _TIMEOUT_S,
    ) -> Any:
        headers = {IDEMPOTENCY_HEADER: uuid.uuid4().hex} if method == "POST" else {}
        try:
            response = self._client.request(
                method, path, json=body, headers=headers, timeout=timeout_s
            )
        except httpx.TransportError as error:
            raise Unreachable(
                f"the server does not answer ({error})",
                field="url",
                value=str(self._client.base_url),
                hint="is it running? start it with: split-server serve",
            ) from error
        try:
            content: object = response.json() if response.content else None
        except ValueError:
            content = None
        if response.is_error:
            raise error_from_wire(content, response.status_code)
        return content
