"""JSON has limits of its own: what FastAPI reads into memory is small, and comes in time."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from split_server.routes.bodies import declared_length, too_large, too_slow
from split_server.routes.errors import Refused

MAX_JSON_BYTES = 1024 * 1024
_FRAMES = "/update"  # read their bodies themselves, under a limit of their own


class SmallBodies:
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
