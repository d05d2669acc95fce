"""The server as the device sees it: one method a request, typed in and out."""

from __future__ import annotations

import json
import logging
import ssl
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
from torch import Tensor

from edge_client.transport.metered import BODY_EXTENSION, MeteredTransport
from edge_client.transport.retry import RetryPolicy
from protocol.errors import (
    InvalidField,
    MalformedFrame,
    SFPromptError,
    Unreachable,
    error_from_wire,
)
from protocol.frames import Frame, decode_frame, encode_frame, frame_length, require_kind
from protocol.messages import (
    Assignment,
    BlobRef,
    EvaluationReport,
    JoinRequest,
    JoinResponse,
    RunView,
    UpdateMeta,
    UpdateReceipt,
    parse_message,
)
from protocol.settings import Message
from protocol.traffic import BACKWARD_PATH, FORWARD_PATH, INFER_PATH, Traffic
from protocol.version import (
    FRAME_MEDIA_TYPE,
    IDEMPOTENCY_HEADER,
    PROTOCOL_VERSION,
    REQUEST_ID_HEADER,
    VERSION_HEADER,
)

log = logging.getLogger("edge_client")
M = TypeVar("M", bound=Message)


class Server:
    """Requests to one split server, repeated under a `RetryPolicy`, metered at the socket.

    Args:
        url: the server's address, e.g. ``http://gpu-node:8500``.
        retry: how long to wait for a server that is busy or out of reach.
        ca_file: a PEM file to trust instead of the system's store, for ``https``.
        answer_timeout_s: seconds to wait for one answer.

    Raises:
        InvalidField: ``url`` is no http(s) address.
    """

    def __init__(
        self,
        url: str,
        *,
        retry: RetryPolicy | None = None,
        ca_file: Path | None = None,
        answer_timeout_s: float = 120.0,
    ) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidField(
                "the server's address is http://HOST:PORT or https://HOST:PORT",
                field="url",
                value=url,
            )
        context = ssl.create_default_context(cafile=str(ca_file)) if ca_file else None
        self._transport = MeteredTransport(context)
        self._retry = retry or RetryPolicy()
        self._client = httpx.Client(
            base_url=url, transport=self._transport, timeout=answer_timeout_s, trust_env=False
        )
        self._headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
        self._answer_timeout_s = answer_timeout_s

    def close(self) -> None:
        self._client.close()

    def traffic(self) -> Traffic:
        """Bytes at the socket so far, both directions, by phase."""
        return self._transport.traffic()

    def authenticate(self, credential: str) -> None:
        """Send this credential with every later request."""
        self._headers["authorization"] = f"Bearer {credential}"

    # Federation plane

    def runs(self) -> list[RunView]:
        body = self._json("GET", "/v1/runs")
        if not isinstance(body, list):
            raise MalformedFrame("a list of runs was expected", field="body")
        return [parse_message(RunView, run) for run in body]

    def run(self, run: str) -> RunView:
        return self._message(RunView, "GET", f"/v1/runs/{run}")

    def join(
        self, run: str, request: JoinRequest, key: str, join_token: str | None = None
    ) -> JoinResponse:
        """Join a run, or with the key of an earlier join get that join's answer again."""
        extra = {"authorization": f"Bearer {join_token}"} if join_token else {}
        path = f"/v1/runs/{run}/participants"
        return self._message(JoinResponse, "POST", path, request, key=key, extra=extra)

    def leave(self, run: str) -> None:
        self._json("DELETE", f"/v1/runs/{run}/participants/me", key=_new_key())

    def assignment(self, run: str, after: Assignment | None, wait_s: float) -> Assignment:
        """The next assignment; waits up to ``wait_s`` while it is still ``after``."""
        query = ""
        if after is not None:
            query = (
                f"?task={after.task}&round={after.round}&attempt={after.attempt}&wait={wait_s:g}"
            )
        return self._message(Assignment, "GET", f"/v1/runs/{run}/assignment{query}")

    def send_update(
        self, run: str, meta: UpdateMeta, state: Mapping[str, Tensor], codec: str
    ) -> UpdateReceipt:
        pieces = encode_frame(
            "update", meta.model_dump(), {name: (value, codec) for name, value in state.items()}
        )
        key = f"update-{meta.round}-{meta.attempt}"
        body = self._call("PUT", f"/v1/runs/{run}/update", pieces, media=FRAME_MEDIA_TYPE, key=key)
        return parse_message(UpdateReceipt, _parse_json(body))

    def send_evaluation(self, run: str, report: EvaluationReport) -> None:
        key = f"evaluation-{report.round}-{report.attempt}"
        self._json("PUT", f"/v1/runs/{run}/evaluation", report, key=key)

    def head(self, run: str, start: int = 0) -> bytearray:
        """The head file's bytes from ``start`` on."""
        return self._download(f"/v1/runs/{run}/head", start)

    def state(self, run: str, ref: BlobRef, start: int = 0) -> bytearray:
        """The bytes of a global state's file from ``start`` on."""
        return self._download(f"/v1/runs/{run}/states/{ref.sha256}/state", start)

    # Split plane

    def forward(self, smashed: Tensor, *, step: str, round_: int, codec: str) -> Tensor:
        """Smashed data [B, T, D] up, features [B, T, D] down; the server keeps the step."""
        meta = {"step": step, "round": round_}
        reply = self._split(FORWARD_PATH, "forward", meta, {"smashed": (smashed, codec)})
        return _tensor(reply, "features", smashed)

    def backward(self, gradients: Tensor, *, step: str, round_: int, codec: str) -> Tensor:
        """Gradient of the features [B, T, D] up, of the smashed data [B, T, D] down."""
        meta = {"step": step, "round": round_}
        reply = self._split(BACKWARD_PATH, "backward", meta, {"gradients": (gradients, codec)})
        return _tensor(reply, "gradients", gradients)

    def infer(self, smashed: Tensor, *, step: str, round_: int, codec: str) -> Tensor:
        """Smashed data [B, T, D] up, features [B, T, D] down; the server keeps nothing."""
        meta = {"step": step, "round": round_}
        reply = self._split(INFER_PATH, "infer", meta, {"smashed": (smashed, codec)})
        return _tensor(reply, "features", smashed)

    # What every request goes through

    def _split(
        self,
        path: str,
        kind: str,
        meta: Mapping[str, Any],
        tensors: Mapping[str, tuple[Tensor, str]],
    ) -> Frame:
        pieces = encode_frame(kind, meta, tensors)
        return decode_frame(self._call("POST", path, pieces, media=FRAME_MEDIA_TYPE))

    def _message(self, kind: type[M], *args: Any, **kwargs: Any) -> M:
        return parse_message(kind, self._json(*args, **kwargs))

    def _json(
        self,
        method: str,
        path: str,
        message: Message | None = None,
        *,
        key: str | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Any:
        pieces = [memoryview(message.model_dump_json().encode())] if message else []
        media = "application/json" if message else None
        return _parse_json(self._call(method, path, pieces, media=media, key=key, extra=extra))

    def _download(self, path: str, start: int) -> bytearray:
        extra = {"range": f"bytes={start}-"} if start else {}
        return self._call("GET", path, [], extra=extra)

    def _call(
        self,
        method: str,
        path: str,
        pieces: list[memoryview],
        *,
        media: str | None = None,
        key: str | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> bytearray:
        headers = {**self._headers, **(extra or {})}
        if media is not None:
            headers["content-type"] = media
        if method != "GET":
            headers["content-length"] = str(frame_length(pieces))
        if key is not None:
            headers[IDEMPOTENCY_HEADER] = key
        return self._retry.call(lambda: self._attempt(method, path, pieces, headers))

    def _attempt(
        self, method: str, path: str, pieces: list[memoryview], headers: dict[str, str]
    ) -> bytearray:
        request_id = uuid.uuid4().hex[:16]
        request = self._client.build_request(
            method,
            path,
            headers={**headers, REQUEST_ID_HEADER: request_id},
            content=_Pieces(pieces) if pieces else None,
        )
        try:
            response = self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise Unreachable(
                f"{method} {path}: {error}",
                field="url",
                value=str(self._client.base_url),
                hint="is the server running, and can this device reach it?",
            ) from (_root_cause(error) or error)
        body: bytearray = response.extensions[BODY_EXTENSION]
        if response.status_code >= 400:
            raise self._refusal(response, body, method, path, request_id)
        log.debug("request %s %s %s -> %d", request_id, method, path, response.status_code)
        return body

    def _refusal(
        self, response: httpx.Response, body: bytearray, method: str, path: str, request_id: str
    ) -> SFPromptError:
        try:
            wire = json.loads(body)
        except ValueError:
            wire = None
        error = error_from_wire(wire, response.status_code)
        if error.retry_after_s is None:
            try:
                error.retry_after_s = float(response.headers.get("retry-after", ""))
            except ValueError:
                error.retry_after_s = None
        log.info("request %s %s %s refused: %s (%s)", request_id, method, path, error.code, error)
        return error


class _Pieces:
    """An iterable that can be sent again, unlike an iterator."""

    def __init__(self, pieces: list[memoryview]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Any:
        return iter(self._pieces)


def _tensor(reply: Frame, name: str, like: Tensor) -> Tensor:
    require_kind(reply, name)
    tensor = reply.tensor(name)
    if tensor.shape != like.shape:
        raise MalformedFrame(
            "the server answered with a tensor of another shape",
            field=name,
            limit=list(like.shape),
            value=list(tensor.shape),
        )
    return tensor.to(like.dtype)


def _parse_json(body: bytearray) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError as error:
        raise MalformedFrame("the server's answer is not JSON", field="body") from error


def _root_cause(error: BaseException) -> BaseException | None:
    cause = error.__cause__
    return cause if isinstance(cause, ssl.SSLCertVerificationError) else None


def _new_key() -> str:
    return uuid.uuid4().hex
