"""The operator's HTTP client, for the command line and other programs."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import httpx

from protocol.errors import InvalidField, NotFound, Unreachable, error_from_wire
from protocol.messages import Event, Results, RunView, parse_message
from protocol.settings import RunSettings
from protocol.tls import create_ssl_context
from protocol.wire import IDEMPOTENCY_HEADER, PROTOCOL_VERSION, VERSION_HEADER
from split_server.settings import OPERATOR_TOKEN_FILE

_TIMEOUT_S = 600.0


def read_token(data_dir: Path) -> str:
    """Read the operator token from a server's data folder.

    Raises:
        NotFound: the folder contains no token.
    """
    path = data_dir / OPERATOR_TOKEN_FILE
    try:
        return path.read_text().strip()
    except OSError:
        raise NotFound(
            "the data folder contains no operator token",
            field="data_dir",
            value=str(path),
            hint="pass the server's --data-dir, or --operator-token-file",
        ) from None


class OperatorClient:
    """Sends the operator's requests; each raises `Unreachable` or the server's typed error.

    Args:
        url: of the server.
        token: the operator token; None: only requests that need no credential.
        ca_file: PEM file of trusted certificates; None: those of the system.

    Raises:
        InvalidField: the address or the certificate file is invalid.
    """

    def __init__(self, url: str, token: str | None = None, ca_file: Path | None = None) -> None:
        headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
        if httpx.URL(url).scheme not in ("http", "https"):
            raise InvalidField(
                "the server's address must begin with http:// or https://",
                field="url",
                value=url,
                hint="for example http://gpu-node:8500",
            )
        verify = create_ssl_context(ca_file) if ca_file else True
        # trust_env=False: do not use an HTTP proxy from the environment.
        self._client = httpx.Client(
            base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False, verify=verify
        )
        if token is not None:
            self.authenticate(token)

    def authenticate(self, token: str) -> None:
        """Send this token with every later request."""
        self._client.headers["authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def is_healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return self._client.get("/v1/health").status_code == 200
        except httpx.TransportError:
            return False

    def create_run(self, settings: RunSettings) -> RunView:
        """Create a run; waits without a timeout while the server prepares the backbone."""
        body = settings.model_dump(mode="json")
        return parse_message(RunView, self._call("POST", "/v1/runs", body, timeout_s=None))

    def runs(self) -> list[RunView]:
        """List all runs, the oldest first."""
        return [parse_message(RunView, run) for run in self._call("GET", "/v1/runs")]

    def results(self, run: str) -> Results:
        """Return a run's rounds, participants and traffic."""
        return parse_message(Results, self._call("GET", f"/v1/runs/{run}/results"))

    def events(self, run: str, after: int, wait_s: float) -> list[Event]:
        """Return the events after number ``after``; waits up to ``wait_s`` for the first."""
        events = self._call("GET", f"/v1/runs/{run}/events?after={after}&wait={wait_s:g}")
        return [parse_message(Event, event) for event in events]

    def cancel(self, run: str) -> RunView:
        """Stop a run."""
        return parse_message(RunView, self._call("POST", f"/v1/runs/{run}/cancel"))

    def remove_participant(self, run: str, participant: str) -> None:
        """Remove a participant, by its id, from a run."""
        self._call("DELETE", f"/v1/runs/{run}/participants/{participant}")

    def delete_run(self, run: str) -> None:
        """Delete a run that is over."""
        self._call("DELETE", f"/v1/runs/{run}")

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float | None = _TIMEOUT_S,
    ) -> Any:
        headers = {IDEMPOTENCY_HEADER: uuid.uuid4().hex} if method != "GET" else {}
        try:
            response = self._client.request(
                method, path, json=body, headers=headers, timeout=timeout_s
            )
        except httpx.TransportError as error:
            is_refused = "certificate" in str(error).lower()
            raise Unreachable(
                f"the server does not answer ({error})",
                field="url",
                value=str(self._client.base_url),
                hint="pass a name in its certificate as --url, and its authority as --ca-file"
                if is_refused
                else "is it running? start it with: split-server serve",
            ) from error
        try:
            content: object = response.json() if response.content else None
        except ValueError:
            content = None
        if response.is_error:
            raise error_from_wire(content, response.status_code)
        return content
