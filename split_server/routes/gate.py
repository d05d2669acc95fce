"""What every request passes: its id, the protocol's version, the meter and the log."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import InternalError, SFPromptError, UnsupportedVersion
from protocol.version import PROTOCOL_VERSION, REQUEST_ID_HEADER, VERSION_HEADER
from split_server.credentials import Member
from split_server.logs import request_id
from split_server.meter import SOCKET_KEY, Meter, SocketCounter
from split_server.routes.responses import send_error

log = logging.getLogger(__name__)

MEMBER_KEY = "sfprompt_member"  # whom the bytes of this request belong to
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Gate:
    """Pure ASGI, outermost: even a refused request has an id, is metered and is logged."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self._app, self._meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        shown = headers.get(REQUEST_ID_HEADER, "")
        token = request_id.set(shown if _REQUEST_ID.fullmatch(shown) else secrets.token_hex(8))
        started, status = time.perf_counter(), 0

        async def send_metered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # Now, before anything is awaited: the next request may be on its way already.
                self._charge(scope)

        try:
            _require_version(headers)
            await self._app(scope, receive, send_metered)
        except SFPromptError as error:
            if status == 0:
                await send_error(send_metered, error)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if status == 0:
                await send_error(send_metered, InternalError("the server failed on this request"))
        finally:
            ms = 1000 * (time.perf_counter() - started)
            level = logging.DEBUG if status < 400 else logging.INFO
            log.log(
                level,
                "%s %s -> %d in %.1f ms",
                scope["method"],
                scope["path"],
                status,
                ms,
            )
            request_id.reset(token)

    def _charge(self, scope: Scope) -> None:
        counter: SocketCounter | None = scope.get("state", {}).get(SOCKET_KEY)
        if counter is None:
            return
        member: Member | None = scope["state"].get(MEMBER_KEY)
        if member is None:
            counter.take()
            counter.last = None
        else:
            self._meter.charge(counter, member.run, member.participant, scope["path"])


def set_member(scope: Scope, member: Member) -> None:
    """The bytes of this request are this participant's."""
    scope.setdefault("state", {})[MEMBER_KEY] = member


def _require_version(headers: Headers) -> None:
    shown = headers.get(VERSION_HEADER)
    if shown is not None and shown != str(PROTOCOL_VERSION):
        raise UnsupportedVersion(
            "this server speaks another version of the protocol",
            field=VERSION_HEADER,
            limit=PROTOCOL_VERSION,
            value=shown[:20],
            hint="run the same release on both ends",
        )
