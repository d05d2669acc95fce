"""JSON has a limit of its own: what FastAPI reads into memory is small."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import TooLarge
from split_server.routes.bodies import declared_length, too_large

MAX_JSON_BYTES = 1024 * 1024
_FRAMES = "/update"  # read their bodies themselves, under a limit of their own


class SmallBodies:
    """Pure ASGI: refuses a long body by its declared length, and cuts one that lies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].endswith(_FRAMES):
            await self._app(scope, receive, send)
            return
        if (length := declared_length(scope)) is not None and length > MAX_JSON_BYTES:
            raise too_large(MAX_JSON_BYTES, length)
        received, over = 0, False

        async def receive_limited() -> Message:
            nonlocal received, over
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_JSON_BYTES:
                over = True
                # FastAPI wraps what is raised here, so it is told that the client has gone.
                return {"type": "http.disconnect"}
            return message

        try:
            await self._app(scope, receive_limited, send)
        except Exception as error:
            if over and not isinstance(error, TooLarge):
                raise too_large(MAX_JSON_BYTES, received) from None
            raise
