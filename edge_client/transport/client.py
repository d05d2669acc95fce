"""The server as the device sees it: one method a request, typed in and out."""

from __future__ import annotations

import json
import logging
import math
import re
import ssl
import uuid
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import torch
from torch import Tensor

from edge_client.transport.connection import Body
from edge_client.transport.http_transport import BODY_EXTENSION, MeteredTransport
from edge_client.transport.link import Link
from edge_client.transport.retry import RetryPolicy
from protocol.base import Message
from protocol.errors import (
    InvalidField,
    MalformedFrame,
    SFPromptError,
    Unreachable,
    error_from_wire,
)
from protocol.frames import Frame, decode_frame, encode_frame, frame_length
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
from protocol.tls import create_ssl_context
from protocol.traffic import Traffic
from protocol.wire import (
    FRAME_MEDIA_TYPE,
    IDEMPOTENCY_HEADER,
    PROTOCOL_VERSION,
    REQUEST_ID_HEADER,
    VERSION_HEADER,
)

log = logging.getLogger("edge_client")

M = TypeVar("M", bound=Message)

_PIECE_BYTES = 4 * 1024 * 1024  # of a download: what is lost at most when a connection breaks

_LONGEST_WAIT_S = 86_400.0


class Server:
    """Requests to one split server, repeated under a `RetryPolicy`, metered at the socket.

    Args:
        url: the server's address, e.g. ``http://gpu-node:8500``.
        retry: how long to wait for a server that is busy or out of reach.
        ca_file: a PEM file to trust instead of the system's store, for ``https``.
        answer_timeout_s: seconds to wait for one answer.
        link: simulates a slower line, for benchmarks.

    Raises:
        InvalidField: ``url`` is no http(s) address, or ``ca_file`` no PEM file.
    """

    def __init__(
        self,
        url: str,
        *,
        retry: RetryPolicy | None = None,
        ca_file: Path | None = None,
        answer_timeout_s: float = 120.0,
        link: Link | None = None,
    ) -> None:
        base = _base_url(url)
        context = create_ssl_context(ca_file) if ca_file else None
        self._transport = MeteredTransport(context, prefix=base.path, link=link)
        self._retry = retry or RetryPolicy()
        self._base = base
        self._address = lru_cache(maxsize=64)(self._join)  # parsing costs more than a small step
        self._timeouts = {"read": answer_timeout_s}
        self._headers = httpx.Headers(
            {
                "host": base.netloc.decode("ascii"),
                # The body is taken as it lies on the wire: nothing between may compress it.
                "accept-encoding": "identity",
                "user-agent": "edge-client",
                VERSION_HEADER: str(PROTOCOL_VERSION),
            }
        )

    def close(self) -> None:
        self._transport.close()

    def traffic(self) -> Traffic:
        """Bytes at the socket so far, both directions, by phase."""
        return self._transport.traffic()

    def authenticate(self, credential: str) -> None:
        """Send this credential with every later request."""
        self._headers["authorization"] = _bearer(credential, "credential")

    # Federation plane

    def runs(self) -> list[RunView]:
        body = self._json("GET", "/v1/runs")
        if not isinstance(body, list):
            raise MalformedFrame("a list of runs was expected", field="body")
        return [parse_message(RunView, run) for run in body]

    def run(self, run: str) -> RunView:
        return self._message(RunView, "GET", _run_path(run))

    def join(
        self, run: str, request: JoinRequest, key: str, join_token: str | None = None
    ) -> JoinResponse:
        """Join a run, or with the key of an earlier join get that join's answer again."""
        extra = {"authorization": _bearer(join_token, "join_token")} if join_token else {}
        path = _run_path(run, "participants")
        return self._message(JoinResponse, "POST", path, request, key=key, extra=extra)

    def leave(self, run: str) -> None:
        """Leave for good; what the server keeps of this device goes."""
        self._json("DELETE", _run_path(run, "participants/me"), key=uuid.uuid4().hex)

    def forget_samples(self, run: str) -> None:
        """Have the server forget the smashed data that it keeps of this device."""
        self._json("DELETE", _run_path(run, "samples"), key=uuid.uuid4().hex)

    def assignment(self, run: str, after: Assignment | None, wait_s: float) -> Assignment:
        """The next assignment; waits up to ``wait_s`` while it is still ``after``."""
        query = ""
        if after is not None:
            query = (
                f"?task={after.task}&round={after.round}&attempt={after.attempt}&wait={wait_s:g}"
            )
        return self._message(Assignment, "GET", _run_path(run, "assignment") + query)

    def send_update(
        self,
        run: str,
        meta: UpdateMeta,
        state: Mapping[str, Tensor],
        codec: str,
        beside: Mapping[str, Tensor] | None = None,
    ) -> UpdateReceipt:
        """The tuned state of a round, or with ``meta.base`` its change against that state.

        ``beside`` it go other tensors, as float32.
        """
        tensors = {name: (value, codec) for name, value in state.items()}
        tensors |= {name: (value, "float32") for name, value in (beside or {}).items()}
        pieces = encode_frame("update", meta.model_dump(), tensors)
        key = f"update-{meta.round}-{meta.attempt}"
        path = _run_path(run, "update")
        answer = self._call("PUT", path, pieces, media=FRAME_MEDIA_TYPE, key=key)
        return parse_message(UpdateReceipt, _parse_json(_body(answer)))

    def send_evaluation(self, run: str, report: EvaluationReport) -> None:
        key = f"evaluation-{report.round}-{report.attempt}"
        self._json("PUT", _run_path(run, "evaluation"), report, key=key)

    def head(self, run: str, start: int = 0, sha256: str | None = None) -> Body:
        """The next bytes of the head file from ``start`` on, not all where it is large.

        Raises:
            NotFound: the run has another one than ``sha256`` by now.
        """
        path = "head" if sha256 is None else f"head?sha256={sha256}"
        return self._download(_run_path(run, path), start)

    def state(self, run: str, ref: BlobRef, start: int = 0) -> Body:
        """The next bytes of a global state's file from ``start`` on, as `head` does."""
        return self._download(_run_path(run, f"states/{ref.sha256}/state"), start)

    def delta(self, run: str, ref: BlobRef, base: BlobRef) -> Frame:
        """What takes the state ``base`` to another.

        Raises:
            NotFound: the server knows no way from the one to the other.
        """
        path = _run_path(run, f"states/{ref.sha256}/delta?base={base.sha256}")
        return decode_frame(_body(self._call("GET", path, [])))

    # Split plane

    def ask(
        self,
        path: str,
        kind: str,
        meta: Mapping[str, Any],
        tensors: Mapping[str, tuple[Tensor, str]],
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> Frame:
        """One frame up to a path of the split plane, one down.

        ``generators`` names tensors whose codec is to round by a generator.
        """
        pieces = encode_frame(kind, meta, tensors, generators=generators)
        return decode_frame(_body(self._call("POST", path, pieces, media=FRAME_MEDIA_TYPE)))

    # What every request goes through

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
        answer = self._call(method, path, pieces, media=media, key=key, extra=extra)
        return _parse_json(_body(answer))

    def _download(self, path: str, start: int) -> Body:
        extra = {"range": f"bytes={start}-{start + _PIECE_BYTES - 1}"}
        answer = self._call("GET", path, [], extra=extra)
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            return _body(answer)[start:]  # a server, or a proxy, that knows no ranges
        stated = answer.headers.get("content-range", "")
        if not re.match(rf"bytes {start}-", stated):
            raise MalformedFrame(
                "the server answered with another part of the file",
                field="content-range",
                limit=f"bytes {start}-",
                value=stated,
            )
        return _body(answer)

    def _call(
        self,
        method: str,
        path: str,
        pieces: list[memoryview],
        *,
        media: str | None = None,
        key: str | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        headers = self._headers.copy()
        if extra:
            headers.update(extra)
        if media is not None:
            headers["content-type"] = media
        if method != "GET":
            headers["content-length"] = str(frame_length(pieces))
        if key is not None:
            headers[IDEMPOTENCY_HEADER] = key
        return self._retry.call(lambda: self._attempt(method, path, pieces, headers))

    def _attempt(
        self, method: str, path: str, pieces: list[memoryview], headers: httpx.Headers
    ) -> httpx.Response:
        request_id = uuid.uuid4().hex[:16]
        headers[REQUEST_ID_HEADER] = request_id
        request = httpx.Request(
            method,
            self._address(path),
            headers=headers,
            stream=_Pieces(pieces),
            extensions={"timeout": self._timeouts},
        )
        try:
            # Not through httpx's client: cookies, redirects and merged headers, of which there are
            # none, took a third of the time that the processor spent on 1.5 MB there and back.
            response = self._transport.handle_request(request)
        except httpx.TransportError as error:
            raise Unreachable(
                f"{method} {path}: {error}",
                field="url",
                value=str(self._base),
                hint="is the server running, and can this device reach it?",
            ) from (_tls_refusal(error) or error)
        if not response.is_success:
            refused = _refusal(response)
            log.info(
                "request %s %s %s refused: %s (%s)", request_id, method, path, refused.code, refused
            )
            raise refused
        log.debug("request %s %s %s -> %d", request_id, method, path, response.status_code)
        return response

    def _join(self, path: str) -> httpx.URL:
        prefix = self._base.raw_path.rstrip(b"/")
        return self._base.copy_with(raw_path=prefix + httpx.URL(path).raw_path)


class _Pieces(httpx.SyncByteStream):
    """A body that can be sent again, unlike an iterator."""

    def __init__(self, pieces: list[memoryview]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Any:
        return iter(self._pieces)


def _base_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    usable = parsed.scheme in ("http", "https") and parsed.host
    if not usable or not 0 < (parsed.port or 80) < 65536:
        raise InvalidField(
            "the server's address is http://HOST:PORT or https://HOST:PORT", field="url", value=url
        )
    return parsed


def _bearer(token: str, field: str) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidField("a token is of visible ASCII characters, without spaces", field=field)
    return f"Bearer {token}"


def _run_path(run: str, rest: str = "") -> str:
    path = f"/v1/runs/{quote(run, safe='')}"
    return f"{path}/{rest}" if rest else path


def _body(response: httpx.Response) -> Body:
    body: Body = response.extensions[BODY_EXTENSION]
    return body


def _refusal(response: httpx.Response) -> SFPromptError:
    if response.is_redirect:
        return InvalidField(
            "the server is at another address",
            field="url",
            value=response.headers["location"],
            hint="give that address",
        )
    try:
        wire = json.loads(bytes(_body(response)))
    except (ValueError, RecursionError):
        wire = None
    error = error_from_wire(wire, response.status_code)
    if error.retry_after_s is None:
        error.retry_after_s = _seconds(response.headers.get("retry-after", ""))
    return error


def _seconds(text: str) -> float | None:
    """What a Retry-After header asks for, if it does so in seconds."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(seconds, _LONGEST_WAIT_S) if seconds >= 0 and not math.isnan(seconds) else None


def _parse_json(body: Body) -> Any:
    try:
        return json.loads(bytes(body)) if body else None
    except (ValueError, RecursionError) as error:
        raise MalformedFrame("the server's answer is not JSON", field="body") from error


def _tls_refusal(error: BaseException) -> ssl.SSLError | None:
    cause = error.__cause__
    return cause if isinstance(cause, ssl.SSLError) else None
