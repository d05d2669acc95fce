"""What every request passes: its id, the protocol's version, the meter and the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import SFPromptError, UnsupportedVersion
from protocol.wire import PROTOCOL_VERSION, REQUEST_ID_HEADER, VERSION_HEADER
from split_server.federation.credentials import Credentials, Identity, Member, Operator
from split_server.http.body import declared_length, too_large, too_slow
from split_server.http.connection import SOCKET_KEY
from split_server.http.errors import Refused, send_error, unexpected
from split_server.runtime.aio import drop_traceback
from split_server.runtime.process import request_id
from split_server.storage.traffic import Meter, SocketCounter

log = logging.getLogger(__name__)

Headers = dict[bytes, bytes]

_ID_NAME, _VERSION_NAME = REQUEST_ID_HEADER.encode(), VERSION_HEADER.encode()

_IDENTITY_KEY = "sfprompt_identity"  # in the scope's state: who is asking

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_FOR_EVERYBODY = "/v1/health"  # answers ends of every version

_LINGER_S = 5.0  # how long a refused body may go on coming

_LINGER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class RequestMiddleware:
    """Pure ASGI, outermost: even a refused request has an id, is metered and is logged."""

    app: ASGIApp
    meter: Meter
    credentials: Credentials | None = None  # None: before the server is ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: Headers = dict(scope["headers"])
        shown = headers.get(_ID_NAME, b"").decode("latin-1")
        token = request_id.set(shown if _REQUEST_ID.fullmatch(shown) else secrets.token_hex(8))
        self._recognise(scope, headers)
        exchange = _RequestScope(self, scope, headers, receive, send)
        began = time.perf_counter()
        try:
            _require_version(scope, headers)
            await self.app(scope, exchange.receive, exchange.send)
        except SFPromptError as error:
            await exchange.refuse(error)
            drop_traceback(error)
        except ClientDisconnect:
            log.debug("the client has gone")
        except Exception as error:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await exchange.refuse(unexpected(error))
            drop_traceback(error)
        finally:
            if not exchange.ended:  # else the next request's bytes may be here already
                self.charge(scope)
            _log_line(scope, exchange.status, time.perf_counter() - began)
            request_id.reset(token)

    def charge(self, scope: Scope) -> None:
        """Put what the connection has counted on the account of this request's participant."""
        counter: SocketCounter | None = scope.get("state", {}).get(SOCKET_KEY)
        if counter is None:
            return
        identity: Identity | None = scope["state"].get(_IDENTITY_KEY)
        if isinstance(identity, Member):
            self.meter.charge(counter, identity.run, identity.participant, scope["path"])
        elif isinstance(identity, Operator):
            counter.take()
        else:
            counter.defer(scope["path"])

    def _recognise(self, scope: Scope, headers: Headers) -> None:
        """Every request that shows a credential is on its account, also where none is needed."""
        if self.credentials is not None:
            shown = headers.get(b"authorization", b"").decode("latin-1")
            identity = self.credentials.identify(shown)
            scope.setdefault("state", {})[_IDENTITY_KEY] = identity


@dataclass
class _RequestScope:
    """One request and its answer, and what of them has passed."""

    gate: RequestMiddleware
    scope: Scope
    headers: Headers
    inner_receive: Receive
    inner_send: Send
    status: int = 0  # 0: no answer yet
    ended: bool = False
    body_is_read: bool = field(init=False)

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
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if ends and not self.body_is_read:
            # The connection closes with this answer. A client that is still sending would be
            # cut off before it has read it, so the rest is taken off its hands for a while.
            await self.inner_send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self.inner_send(message)
        if ends:
            # Now, before anything is awaited: the next request may be on its way already.
            self.ended = True
            self.gate.charge(self.scope)

    async def refuse(self, error: SFPromptError) -> None:
        if self.status == 0:
            with contextlib.suppress(ClientDisconnect):
                await send_error(self.send, error)

    def _begin(self, message: Message) -> Message:
        self.status = message["status"]
        own = {_ID_NAME: request_id.get().encode(), _VERSION_NAME: b"%d" % PROTOCOL_VERSION}
        if not self.body_is_read:
            own[b"connection"] = b"close"
        kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in own]
        return {**message, "headers": [*kept, *own.items()]}

    async def _drain(self) -> None:
        taken = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self.body_is_read and taken < _LINGER_BYTES:
                    taken += len((await self.receive()).get("body", b""))


def identity_of(scope: Scope) -> Identity:
    """Who shows the credential of this request."""
    identity: Identity = scope["state"][_IDENTITY_KEY]
    return identity


def set_member(scope: Scope, member: Member) -> None:
    """The bytes of this request are this participant's, though it showed no credential."""
    scope.setdefault("state", {})[_IDENTITY_KEY] = member


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
    shown = headers.get(_VERSION_NAME)
    if shown == b"%d" % PROTOCOL_VERSION or scope["path"] == _FOR_EVERYBODY:
        return
    if shown is None and scope["method"] in ("GET", "HEAD"):
        return  # a person with a browser
    raise UnsupportedVersion(
        "this server speaks another version of the protocol"
        if shown is not None
        else "every request that does something names the protocol's version",
        field=VERSION_HEADER,
        limit=PROTOCOL_VERSION,
        value=None if shown is None else shown[:20].decode("latin-1"),
        hint="run the same release on both ends",
    )


MAX_JSON_BYTES = 1024 * 1024

_FRAMES = "/update"  # read their bodies themselves, under a limit of their own


class JSONBodyLimit:
    """Pure ASGI: refuses a long body by its declared length, and cuts one that lies."""

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].endswith(_FRAMES):
            await self._app(scope, receive, send)
            return
        if (length := declared_length(scope)) is not None and length > MAX_JSON_BYTES:
            raise too_large(MAX_JSON_BYTES, length)
        await self._app(scope, _Limited(receive, self._timeout_s).receive, send)


class _Limited:
    """A request's ``receive`` that counts bytes and time, until the body is there."""

    def __init__(self, receive: Receive, timeout_s: float) -> None:
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
        return message
