"""Reading a request's body: into one buffer, never more than was allowed."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from protocol.errors import InvalidField, MalformedFrame, TooLarge
from split_server.routes.room import Claim


def declared_length(scope: Scope) -> int | None:
    """The Content-Length, if the request has one.

    Raises:
        InvalidField: it is no number.
    """
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise InvalidField("not a length", field="content-length", value=repr(value))
            return int(value)
    return None


async def read_body(
    scope: Scope, receive: Receive, limit: int, timeout_s: float, claim: Claim | None = None
) -> bytearray:
    """The whole body in one writable buffer; ``claim`` takes room for it as it comes.

    Raises:
        TooLarge: it is declared longer than ``limit`` bytes, or comes longer.
        MalformedFrame: it ended early, or did not come within ``timeout_s`` seconds.
        Busy: there is no room for it now.
    """
    length = declared_length(scope)
    if length is not None and length > limit:
        raise too_large(limit, length)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive, length, limit, claim)
    except TimeoutError:
        raise too_slow(timeout_s) from None


async def _read(receive: Receive, length: int | None, limit: int, claim: Claim | None) -> bytearray:
    # A declared length is not believed beyond what has come: the buffer grows with the bytes.
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        if len(body) + len(chunk) > limit:
            raise too_large(limit, len(body) + len(chunk))
        if claim is not None:
            claim.add(len(chunk))
        body += chunk
        if not message.get("more_body", False):
            break
    if length is not None and len(body) != length:
        raise MalformedFrame("the body ended early", field="body", limit=length, value=len(body))
    return body


def too_large(limit: int, value: int) -> TooLarge:
    """The refusal of a body that is over its limit."""
    return TooLarge(
        "the request's body is too large",
        field="body",
        limit=limit,
        value=value,
        hint="send smaller batches, or raise --max-frame-mib on the server",
    )


def too_slow(limit_s: float) -> MalformedFrame:
    """The refusal of a body that does not come."""
    return MalformedFrame("the body did not come in time", field="body", limit=limit_s)
