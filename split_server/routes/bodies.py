"""Reading a request's body: into one buffer, never more than was allowed."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from protocol.errors import InvalidField, MalformedFrame, TooLarge
from split_server.routes.room import Claim
from split_server.sink import SINK_KEY, SinkHolder


def declared_length(scope: Scope) -> int | None:
    """The Content-Length, if the request has one.

    Raises:
        InvalidField: it is no number.
    """
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise InvalidField(
                    "not a length", field="content-length", limit="digits", value=repr(value)
                )
            return int(value)
    return None


async def read_body(
    scope: Scope, receive: Receive, limit: int, timeout_s: float, claim: Claim | None = None
) -> bytearray | memoryview:
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
            return await _read(scope, receive, length, limit, claim)
    except TimeoutError:
        raise too_slow(timeout_s) from None


async def _read(
    scope: Scope, receive: Receive, length: int | None, limit: int, claim: Claim | None
) -> bytearray | memoryview:
    holder: SinkHolder | None = scope.get("state", {}).get(SINK_KEY)
    if holder is not None and length is not None:
        return await _into_sink(holder, receive, length, claim)
    # A declared length is not believed beyond what has come: the buffer grows with the bytes.
    body = bytearray()
    while True:
        message = await _next(receive)
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


async def _into_sink(
    holder: SinkHolder, receive: Receive, length: int, claim: Claim | None
) -> memoryview:
    """The body straight from the parser, behind what it has kept so far."""
    first = await _next(receive)
    sink = holder.open(length, first.get("body", b""), claim)
    try:
        if first.get("more_body", False):
            await sink.complete
            while (await _next(receive)).get("more_body", False):  # the end, told to all others
                pass
        if not sink.complete.done():
            raise MalformedFrame("the body ended early", field="body", limit=length)
        return sink.complete.result()
    except ConnectionError:
        raise ClientDisconnect from None
    finally:
        holder.sink = None


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


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
