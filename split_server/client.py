"""The operator's HTTP client, for the command line and other programs."""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx

from protocol.errors import (
    Busy,
    InvalidField,
    NotFound,
    SFPromptError,
    Unreachable,
    error_from_wire,
)
from protocol.messages import Event, Results, RunView, parse_message
from protocol.quality import EvaluationView
from protocol.run_state import RunState
from protocol.settings import RunSettings
from protocol.tls import create_ssl_context
from protocol.untyped import describe_request, is_typed, untyped_error
from protocol.wire import IDEMPOTENCY_HEADER, PROTOCOL_VERSION, VERSION_HEADER
from split_server.settings import OPERATOR_TOKEN_FILE

_TIMEOUT_S = 600.0

_CREATE_PATIENCE_S = 900.0  # while the server makes a run's files, or something in between fails

_CREATE_PAUSE_S = (1.0, 15.0)  # the first and the longest


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

    def create_run(
        self,
        settings: RunSettings,
        key: str | None = None,
        on_wait: Callable[[SFPromptError], None] = lambda _error: None,
    ) -> RunView:
        """Create a run; waits while the server prepares the backbone.

        If the response is lost, or an HTTP proxy does not wait for it, the request is repeated
        with the same key, and finds the run that the first one has made.

        Args:
            settings: of the run.
            key: names this creation: the same key gives the same run; None: a new one.
            on_wait: called before each repetition.

        Raises:
            Busy, Unreachable: no response for a quarter of an hour, or no server at all.
        """
        body, key = settings.model_dump(mode="json"), key or uuid.uuid4().hex
        (pause, longest), give_up_at = _CREATE_PAUSE_S, time.monotonic() + _CREATE_PATIENCE_S
        is_sent = False
        while True:
            try:
                answer = self._call("POST", "/v1/runs", body, timeout_s=None, key=key)
                return parse_message(RunView, answer)
            except (Busy, Unreachable) as error:
                # A server that never was there is not waited for.
                is_sent = is_sent or not isinstance(error.__cause__, httpx.ConnectError)
                if not is_sent or time.monotonic() > give_up_at:
                    if is_sent:
                        error.hint = f"the run may exist; find it with: --key {key}"
                    raise
                on_wait(error)
                time.sleep(pause)
                pause = min(2 * pause, longest)

    def runs(self) -> list[RunView]:
        """List all runs, the oldest first."""
        return [parse_message(RunView, run) for run in self._call("GET", "/v1/runs")]

    def results(self, run: str) -> Results:
        """Return a run's rounds, participants and traffic."""
        return parse_message(Results, self._call("GET", f"/v1/runs/{run}/results"))

    def evaluation(self, run: str, round_: int) -> EvaluationView:
        """Return how well a round's state classifies held-out images, in all and by device."""
        path = f"/v1/runs/{run}/rounds/{round_}/evaluation"
        return parse_message(EvaluationView, self._call("GET", path))

    def events(self, run: str, after: int, wait_s: float) -> list[Event]:
        """Return the events after number ``after``; waits up to ``wait_s`` for the first."""
        events = self._call("GET", f"/v1/runs/{run}/events?after={after}&wait={wait_s:g}")
        return [parse_message(Event, event) for event in events]

    def status(self, run: str) -> RunState:
        """Return who is there, and what a run waits for."""
        return parse_message(RunState, self._call("GET", f"/v1/runs/{run}/status"))

    def steer(self, run: str, action: Literal["pause", "resume", "close-round"]) -> RunView:
        """Pause or resume a run, or end the open phase of its round."""
        return parse_message(RunView, self._call("POST", f"/v1/runs/{run}/{action}"))

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
        key: str | None = None,
    ) -> Any:
        headers = {IDEMPOTENCY_HEADER: key or uuid.uuid4().hex} if method != "GET" else {}
        try:
            response = self._client.request(
                method, path, json=body, headers=headers, timeout=timeout_s
            )
        except httpx.TransportError as error:
            raise _unreachable(str(self._client.base_url), error) from error
        try:
            content: object = response.json() if response.content else None
        except ValueError:
            content = None
        if response.is_error and not is_typed(content):
            nbytes = len(response.request.content)
            request = describe_request(method, path.partition("?")[0], nbytes)
            raise untyped_error(response.status_code, request, nbytes)
        if response.is_error:
            raise error_from_wire(content, response.status_code)
        return content


def _unreachable(url: str, error: httpx.TransportError) -> Unreachable:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return Unreachable(
            f"the server's certificate is not trusted: {cause.verify_message}",
            field="url",
            value=url,
            hint="give the server's certificate with --ca-file, and use a name that it is made for",
        )
    return Unreachable(
        f"the server does not answer ({error})",
        field="url",
        value=url,
        hint="is it running? start it with: split-server serve",
    )
