"""Typed client of the split server: one method for each request."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import httpx

from edge_client.transport.http_transport import BODY_EXTENSION, MeteredTransport
from edge_client.transport.link import Link
from edge_client.transport.outages import SILENCE_S, Outages, Tell
from edge_client.transport.polling import PollWait
from edge_client.transport.refusals import refusal_of, unreachable
from edge_client.transport.response import Body
from edge_client.transport.retry import RetryPolicy
from protocol.base import Message
from protocol.checksums import JSONChecksum
from protocol.errors import InvalidField, MalformedFrame, SFPromptError
from protocol.messages import (
    Absence,
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
from protocol.untyped import STATUS_FIELD
from protocol.wire import (
    CHECKSUM_HEADER,
    FRAME_MEDIA_TYPE,
    IDEMPOTENCY_HEADER,
    PROTOCOL_VERSION,
    REQUEST_ID_HEADER,
    VERSION_HEADER,
)

# Frames import every codec, which most requests do without.
if TYPE_CHECKING:
    from protocol.arrays import Array, Generator
    from protocol.frames import Frame

log = logging.getLogger("edge_client")

M = TypeVar("M", bound=Message)

_PIECE_BYTES = 4 * 1024 * 1024  # of a download; a broken connection loses at most one piece

_END_S = 5.0  # for the last message of a process


class Server:
    """Sends requests to one split server, with retries, and counts their bytes at the socket.

    Args:
        url: the server's address, e.g. ``http://gpu-node:8500``.
        retry: when to retry; None: the default policy.
        ca_file: a PEM file to trust instead of the system's store, for ``https``.
        response_timeout_s: seconds to wait for one response.
        link: simulates a slower line, for benchmarks.
        tell: receives what a person should hear of the server's silence: a kind and a sentence.

    Raises:
        InvalidField: ``url`` is not an http(s) address, or ``ca_file`` not a PEM file.
    """

    def __init__(
        self,
        url: str,
        *,
        retry: RetryPolicy | None = None,
        ca_file: Path | None = None,
        response_timeout_s: float = 120.0,
        link: Link | None = None,
        tell: Tell = lambda _kind, _message: None,
    ) -> None:
        base = _base_url(url)
        context = create_ssl_context(ca_file) if ca_file else None
        self._outages = Outages(tell)
        self._poll_wait = PollWait()
        self._transport = MeteredTransport(
            context, prefix=base.path, link=link, on_silence=self._outages.silent
        )
        self._retry = retry or RetryPolicy()
        self._base = base
        self._resolve = lru_cache(maxsize=64)(
            self._resolve_path
        )  # parsing takes longer than a small step
        self._response_timeout_s = response_timeout_s
        self._headers = httpx.Headers(
            {
                "host": base.netloc.decode("ascii"),
                # Bodies are read as they are on the wire: an HTTP proxy must not compress them.
                "accept-encoding": "identity",
                "user-agent": "edge-client",
                VERSION_HEADER: str(PROTOCOL_VERSION),
            }
        )

    def close(self) -> None:
        self._transport.close()

    def traffic(self) -> Traffic:
        """Return the bytes at the socket so far, in both directions, by phase."""
        return self._transport.traffic()

    def authenticate(self, credential: str, field: str = "credential") -> None:
        """Send this credential, or the join token, with every later request.

        Raises:
            InvalidField: it cannot be sent; names the field.
        """
        self._headers["authorization"] = _bearer(credential, field)

    # Federation plane

    def runs(self) -> list[RunView]:
        body = self._json("GET", "/v1/runs")
        if not isinstance(body, list):
            raise MalformedFrame("the server's response is not a list of runs", field="body")
        return [parse_message(RunView, run) for run in body]

    def run(self, run: str) -> RunView:
        return self._message(RunView, "GET", _run_path(run))

    def join(
        self, run: str, request: JoinRequest, key: str, join_token: str | None = None
    ) -> JoinResponse:
        """Join a run; with the key of an earlier join, get that join's response again."""
        headers = {"authorization": _bearer(join_token, "join_token")} if join_token else {}
        path = _run_path(run, "participants")
        return self._message(JoinResponse, "POST", path, request, key=key, headers=headers)

    def leave(self, run: str) -> None:
        """Leave the run for good; the server deletes this device's samples."""
        self._json("DELETE", _run_path(run, "participants/me"), key=uuid.uuid4().hex)

    def end(self, run: str, reason: str) -> None:
        """Tell the server that this process ends, once and without waiting for a lost server."""
        pieces = [memoryview(Absence(reason=reason).model_dump_json().encode())]
        path = _run_path(run, "participants/me/absence")
        request = self._request("PUT", path, pieces, media="application/json", timeout_s=_END_S)
        with contextlib.suppress(SFPromptError):
            request()

    def forget_samples(self, run: str) -> None:
        """Delete this device's smashed data from the server's cache."""
        self._json("DELETE", _run_path(run, "samples"), key=uuid.uuid4().hex)

    def assignment(self, run: str, after: Assignment | None, wait_s: float) -> Assignment:
        """Return the next assignment; wait up to ``wait_s`` seconds while it equals ``after``.

        The wait is shorter if something between device and server does not survive a longer one.
        """

        def poll() -> httpx.Response:
            path, timeout_s = _run_path(run, "assignment"), None
            if after is not None:
                wait = self._poll_wait.bounded(wait_s)
                timeout_s = min(self._response_timeout_s, wait + SILENCE_S)
                path += f"?task={after.task}&round={after.round}&attempt={after.attempt}"
                path += f"&wait={wait:g}"
            started = time.monotonic()
            try:
                response = self._request("GET", path, [], timeout_s=timeout_s)()
            except SFPromptError as error:
                self._poll_wait.failed(error, time.monotonic() - started)
                raise
            self._poll_wait.succeeded()
            return response

        return parse_message(Assignment, _parse_json(_body(self._retry.call(poll))))

    def send_update(
        self,
        run: str,
        meta: UpdateMeta,
        state: Mapping[str, Array],
        codec: str,
        extras: Mapping[str, Array] | None = None,
    ) -> UpdateReceipt:
        """Send a round's update.

        Args:
            run: the run's id.
            meta: describes the update.
            state: the tuned tensors, or with ``meta.base`` their differences from that state.
            codec: encodes ``state``.
            extras: further tensors, sent as float32.
        """
        from protocol.frames import encode_frame

        tensors = {name: (value, codec) for name, value in state.items()}
        tensors |= {name: (value, "float32") for name, value in (extras or {}).items()}
        pieces = encode_frame("update", meta.model_dump(), tensors)
        key = f"update-{meta.round}-{meta.attempt}"
        path = _run_path(run, "update")
        response = self._call("PUT", path, pieces, media=FRAME_MEDIA_TYPE, key=key)
        return parse_message(UpdateReceipt, _parse_json(_body(response)))

    def send_evaluation(self, run: str, report: EvaluationReport) -> None:
        key = f"evaluation-{report.round}-{report.attempt}"
        self._json("PUT", _run_path(run, "evaluation"), report, key=key)

    def head(self, run: str, start: int = 0, sha256: str | None = None) -> Body:
        """Return the head file's next bytes from ``start`` on, at most one piece.

        Raises:
            NotFound: the run's head is no longer ``sha256``.
        """
        path = "head" if sha256 is None else f"head?sha256={sha256}"
        return self._download(_run_path(run, path), start)

    def state(self, run: str, ref: BlobRef, start: int = 0) -> Body:
        """Return the next bytes of a global state's file from ``start`` on, at most one piece."""
        return self._download(_run_path(run, f"states/{ref.sha256}/state"), start)

    def delta(self, run: str, ref: BlobRef, base: BlobRef) -> Frame:
        """Return the difference that turns the state ``base`` into the state ``ref``.

        Raises:
            NotFound: the server has no such difference.
            DamagedFrame: it is damaged.
        """
        path = _run_path(run, f"states/{ref.sha256}/delta?base={base.sha256}")
        from protocol.frames import decode_frame

        return decode_frame(_body(self._call("GET", path, [])))

    # Split plane

    def send_frame(
        self,
        path: str,
        kind: str,
        meta: Mapping[str, Any],
        tensors: Mapping[str, tuple[Array, str]],
        generators: Mapping[str, Generator] | None = None,
        waits_s: float = 0.0,
    ) -> Frame:
        """Send one frame to a path of the split plane, and return the response's frame.

        Args:
            path: of the split plane.
            kind: of the sent frame.
            meta: of the sent frame.
            tensors: each with its codec.
            generators: for the tensors whose codec rounds stochastically.
            waits_s: seconds that the server may hold the request back for others.
        """
        from protocol.frames import decode_frame, encode_frame

        pieces = encode_frame(kind, meta, tensors, generators=generators)
        request = self._request("POST", path, pieces, media=FRAME_MEDIA_TYPE, waits_s=waits_s)
        return self._retry.call(lambda: decode_frame(_body(request())))

    # Shared by all requests

    def _message(self, kind: type[M], *args: Any, **kwargs: Any) -> M:
        return parse_message(kind, self._json(*args, **kwargs))

    def _json(
        self,
        method: str,
        path: str,
        message: Message | None = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        pieces = [memoryview(message.model_dump_json().encode())] if message else []
        media = "application/json" if message else None
        if pieces:
            checksum = JSONChecksum(key or "").update(pieces[0]).text()
            headers = {**(headers or {}), CHECKSUM_HEADER: checksum}
        response = self._call(method, path, pieces, media=media, key=key, headers=headers)
        return _parse_json(_body(response))

    def _download(self, path: str, start: int) -> Body:
        headers = {"range": f"bytes={start}-{start + _PIECE_BYTES - 1}"}
        response = self._call("GET", path, [], headers=headers)
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            return _body(response)[start:]  # the server, or an HTTP proxy, ignores ranges
        content_range = response.headers.get("content-range", "")
        if not re.match(rf"bytes {start}-", content_range):
            raise MalformedFrame(
                "the server answered with another part of the file",
                field="content-range",
                limit=f"bytes {start}-",
                value=content_range,
            )
        return _body(response)

    def _call(
        self,
        method: str,
        path: str,
        pieces: list[memoryview],
        *,
        media: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        request = self._request(method, path, pieces, media=media, key=key, headers=headers)
        return self._retry.call(request)

    def _request(
        self,
        method: str,
        path: str,
        pieces: list[memoryview],
        *,
        media: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        waits_s: float = 0.0,
    ) -> Callable[[], httpx.Response]:
        """Return the function that sends a request once.

        Args:
            method, path, pieces: of the request.
            media: the type of the body.
            key: idempotency key.
            headers: further ones.
            timeout_s: seconds to wait for the response; None: those of all requests.
            waits_s: seconds of silence that are no sign of an outage.
        """
        sent = self._headers.copy()
        if headers:
            sent.update(headers)
        if media is not None:
            sent["content-type"] = media
        if method != "GET":
            sent["content-length"] = str(sum(piece.nbytes for piece in pieces))
        if key is not None:
            sent[IDEMPOTENCY_HEADER] = key
        limits = {"read": timeout_s or self._response_timeout_s, "silence": SILENCE_S + waits_s}
        return lambda: self._attempt(method, path, pieces, sent, limits)

    def _attempt(
        self,
        method: str,
        path: str,
        pieces: list[memoryview],
        headers: httpx.Headers,
        limits: Mapping[str, float],
    ) -> httpx.Response:
        request_id = uuid.uuid4().hex[:16]
        headers[REQUEST_ID_HEADER] = request_id
        request = httpx.Request(
            method,
            self._resolve(path),
            headers=headers,
            stream=_Pieces(pieces),
            extensions={"timeout": limits},
        )
        try:
            # Without httpx's client: its handling of cookies, redirects and headers, all unused
            # here, takes a third of the CPU time of a round trip of 1.5 MB.
            response = self._transport.handle_request(request)
        except httpx.TransportError as error:
            self._outages.failed()
            made = unreachable(request, self._base, error)
            raise made from made.__cause__
        if (checksum := response.headers.get(CHECKSUM_HEADER)) is not None:
            JSONChecksum().update(_body(response)).check(checksum)
        if not response.is_success:
            refusal = refusal_of(response, _body(response), request)
            if refusal.field == STATUS_FIELD and refusal.retry_after_s is None:
                self._outages.failed()
            log.info(
                "request %s %s %s refused: %s (%s)", request_id, method, path, refusal.code, refusal
            )
            raise refusal
        self._outages.heard()
        log.debug("request %s %s %s -> %d", request_id, method, path, response.status_code)
        return response

    def _resolve_path(self, path: str) -> httpx.URL:
        prefix = self._base.raw_path.rstrip(b"/")
        return self._base.copy_with(raw_path=prefix + httpx.URL(path).raw_path)


class _Pieces(httpx.SyncByteStream):
    """A request body that can be sent again, unlike an iterator."""

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
            "the server's address has to be http://HOST:PORT or https://HOST:PORT",
            field="url",
            value=url,
        )
    return parsed


def _bearer(token: str, field: str) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidField(
            "a token has to consist of visible ASCII characters, without spaces", field=field
        )
    return f"Bearer {token}"


def _run_path(run: str, rest: str = "") -> str:
    path = f"/v1/runs/{quote(run, safe='')}"
    return f"{path}/{rest}" if rest else path


def _body(response: httpx.Response) -> Body:
    body: Body = response.extensions[BODY_EXTENSION]
    return body


def _parse_json(body: Body) -> Any:
    try:
        return json.loads(bytes(body)) if body else None
    except (ValueError, RecursionError) as error:
        raise MalformedFrame("the server's response is not JSON", field="body") from error
