"""ASGI middleware: request id, protocol version, identity, traffic, log, limit of JSON bodies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.checksums import JSONChecksum
from protocol.errors import DamagedFrame, SFPromptError, UnsupportedVersion
from protocol.wire import (
    CHECKSUM_HEADER,
    IDEMPOTENCY_HEADER,
    PROTOCOL_VERSION,
    REQUEST_ID_HEADER,
    VERSION_HEADER,
)
from split_server.federation.credentials import (
    Anonymous,
    Credentials,
    Identity,
    Operator,
    ParticipantIdentity,
)
from split_server.http.audit import AuditLog
from split_server.http.body import declared_length, too_large, too_slow
from split_server.http.connection import IDENTIFY_KEY, SOCKET_KEY
from split_server.http.errors import Refused, send_error, unexpected
from split_server.page.session import Sessions
from split_server.runtime.aio import drop_traceback
from split_server.runtime.process import request_id
from split_server.storage.traffic import Meter, SocketCounter

log = logging.getLogger(__name__)

Headers = dict[bytes, bytes]

_CHECKSUM_NAME, _KEY_NAME = CHECKSUM_HEADER.encode(), IDEMPOTENCY_HEADER.encode()

_JSON = (b"content-type", b"application/json")

_ID_NAME, _VERSION_NAME = REQUEST_ID_HEADER.encode(), VERSION_HEADER.encode()

_IDENTITY_KEY = "sfprompt_identity"  # in the scope's state: the sender's `Identity`

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_ANY_VERSION = "/v1/health"  # accepts every protocol version

_LINGER_S = 5.0  # time for receiving the rest of a refused body

_LINGER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class RequestMiddleware:
    """The outermost middleware: it identifies, counts and logs refused requests too."""

    app: ASGIApp
    meter: Meter
    credentials: Credentials | None = None  # None: the server is still starting
    audit: AuditLog | None = None
    sessions: Sessions | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: Headers = dict(scope["headers"])
        sent_id = headers.get(_ID_NAME, b"").decode("latin-1")
        is_valid = _REQUEST_ID.fullmatch(sent_id)
        token = request_id.set(sent_id if is_valid else secrets.token_hex(8))
        request = _RequestScope(self, scope, headers, receive, send)
        started = time.perf_counter()
        try:
            self._identify(scope, headers)
            _require_version(scope, headers)
            await self.app(scope, request.receive, request.send)
        except SFPromptError as error:
            await request.refuse(error)
            drop_traceback(error)
        except ClientDisconnect:
            log.debug("the client has disconnected")
        except Exception as error:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await request.refuse(unexpected(error))
            drop_traceback(error)
        finally:
            if not request.ended:  # the counter may already contain bytes of the next request
                self.charge(scope)
            _log_line(scope, request.status, time.perf_counter() - started)
            if self.audit is not None:
                self.audit.record(scope, identity_of(scope), request.status)
            request_id.reset(token)

    def charge(self, scope: Scope) -> None:
        """Charge the counted bytes of the connection to the participant that sent the request."""
        counter: SocketCounter | None = scope.get("state", {}).get(SOCKET_KEY)
        if counter is None:
            return
        identity: Identity | None = scope["state"].get(_IDENTITY_KEY)
        if isinstance(identity, ParticipantIdentity):
            self.meter.charge(counter, identity.run, identity.participant, scope["path"])
        elif isinstance(identity, Operator):
            counter.take()
        else:
            counter.defer(scope["path"])

    def _identify(self, scope: Scope, headers: Headers) -> None:
        """Store the sender's identity, for access checks and for the traffic."""
        if self.credentials is None:
            return
        authorization = headers.get(b"authorization")
        if authorization is None and self.sessions is not None and b"cookie" in headers:
            _set_identity(scope, Operator() if self.sessions.is_open(headers) else Anonymous())
            return
        text = (authorization or b"").decode("latin-1")
        _set_identity(scope, self.credentials.identify(text))


@dataclass
class _RequestScope:
    """A request and its response, with the progress of their transfer."""

    middleware: RequestMiddleware
    scope: Scope
    headers: Headers
    inner_receive: Receive
    inner_send: Send
    status: int = 0  # 0: no response yet
    ended: bool = False
    body_is_read: bool = field(init=False)
    held_start: Message | None = None

    def __post_init__(self) -> None:
        length = self.headers.get(b"content-length", b"0")
        self.body_is_read = length == b"0" and b"transfer-encoding" not in self.headers

    async def receive(self) -> Message:
        message = await self.inner_receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.body_is_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._begin(message)
            if _JSON in message["headers"]:
                self.held_start = message  # until the body is there, for its checksum
                return
        if self.held_start is not None:
            start, self.held_start = self.held_start, None
            await self.inner_send(_with_checksum(start, message))
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if ends and not self.body_is_read:
            # The connection closes after this response. A client that is still sending would lose
            # the connection before it reads the response, so the rest of its body is received.
            await self.inner_send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self.inner_send(message)
        if ends:
            # No await before this line: the next request may already be arriving.
            self.ended = True
            self.middleware.charge(self.scope)

    async def refuse(self, error: SFPromptError) -> None:
        if self.status == 0:
            with contextlib.suppress(ClientDisconnect):
                await send_error(self.send, error)

    def _begin(self, message: Message) -> Message:
        self.status = message["status"]
        replaced = {_ID_NAME: request_id.get().encode(), _VERSION_NAME: b"%d" % PROTOCOL_VERSION}
        if not self.body_is_read:
            replaced[b"connection"] = b"close"
        others = [pair for pair in message.get("headers", []) if pair[0].lower() not in replaced]
        return {**message, "headers": [*others, *replaced.items()]}

    async def _drain(self) -> None:
        received = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self.body_is_read and received < _LINGER_BYTES:
                    received += len((await self.receive()).get("body", b""))


def _with_checksum(start: Message, body: Message) -> Message:
    """Add the checksum to the start of a response whose whole body is the next message."""
    if body.get("more_body", False):
        return start
    checksum = JSONChecksum().update(body.get("body", b"")).text()
    return {**start, "headers": [*start["headers"], (_CHECKSUM_NAME, checksum.encode())]}


def identity_of(scope: Scope) -> Identity:
    """Return the identity of a request's sender."""
    identity: Identity = scope["state"][_IDENTITY_KEY]
    return identity


def set_participant(scope: Scope, identity: ParticipantIdentity) -> None:
    """Charge this request to a participant, although it carried no credential."""
    _set_identity(scope, identity)


def _set_identity(scope: Scope, identity: Identity) -> None:
    """Store the sender of a request, also for the limits of its connection.

    Raises:
        Busy: the sender has too many connections in use.
    """
    state = scope.setdefault("state", {})
    state[_IDENTITY_KEY] = identity
    if (identify := state.get(IDENTIFY_KEY)) is not None:
        identify(identity)


def _log_line(scope: Scope, status: int, seconds: float) -> None:
    log.log(
        logging.DEBUG if status < 400 else logging.INFO,
        "%s %s -> %d in %.1f ms",
        scope["method"],
        scope["path"],
        status,
        1000 * seconds,
    )


def _require_version(scope: Scope, headers: Headers) -> None:
    version = headers.get(_VERSION_NAME)
    if version == b"%d" % PROTOCOL_VERSION or scope["path"] == _ANY_VERSION:
        return
    if version is None and scope["method"] in ("GET", "HEAD"):
        return  # e.g. a browser
    raise UnsupportedVersion(
        "this server uses another version of the protocol"
        if version is not None
        else "a request that changes something must name the protocol's version",
        field=VERSION_HEADER,
        limit=PROTOCOL_VERSION,
        value=None if version is None else version[:20].decode("latin-1"),
        hint="run the same release on client and server",
    )


MAX_JSON_BYTES = 1024 * 1024


class JSONBodyLimit:
    """Refuses a body whose declared or received length exceeds `MAX_JSON_BYTES`.

    Args:
        app: the inner app.
        timeout_s: time for the whole body.
        is_exempt: returns whether the route of a request limits the body itself.
    """

    def __init__(self, app: ASGIApp, timeout_s: float, is_exempt: Callable[[Scope], bool]) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._is_exempt = is_exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_exempt(scope):
            await self._app(scope, receive, send)
            return
        if (length := declared_length(scope)) is not None and length > MAX_JSON_BYTES:
            raise too_large(MAX_JSON_BYTES, length)
        headers: Headers = dict(scope["headers"])
        limited = _Limited(
            receive,
            self._timeout_s,
            JSONChecksum(headers.get(_KEY_NAME, b"").decode("latin-1")),
            headers.get(_CHECKSUM_NAME),
        )
        await self._app(scope, limited.receive, send)


class _Limited:
    """Wraps ``receive`` with limits of bytes and time until the body is complete.

    Args:
        receive: of the request.
        timeout_s: for the whole body.
        checksum: that of no bytes yet.
        declared: the checksum in the request's header; None: it has none.
    """

    def __init__(
        self, receive: Receive, timeout_s: float, checksum: JSONChecksum, declared: bytes | None
    ) -> None:
        self._checksum = checksum
        self._declared = declared
        self._receive = receive
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._nbytes = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Refused(too_slow(self._timeout_s)) from None
        self._nbytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._nbytes > MAX_JSON_BYTES:
            raise Refused(too_large(MAX_JSON_BYTES, self._nbytes))
        if self._declared is not None:
            self._check(message.get("body", b""), self._declared)
        return message

    def _check(self, piece: bytes, declared: bytes) -> None:
        self._checksum.update(piece)
        if self._complete:
            try:
                self._checksum.check(declared.decode("latin-1"))
            except DamagedFrame as error:
                raise Refused(error) from None
