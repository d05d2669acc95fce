"""Reading a request's body: into one buffer, never more than was allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from protocol.errors import Busy, InvalidField, MalformedFrame, TooLarge


class BodyBudget:
    """A bound on the bytes of all requests that are being read or worked on.

    Used on the event loop alone.

    Args:
        limit: in bytes.
        busy: makes the refusal, which says when the queue will have been worked off.
    """

    def __init__(self, limit: int, busy_error: Callable[[str], Busy]) -> None:
        self._limit = limit
        self._busy = busy_error
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes that are held now."""
        return self._taken

    @contextmanager
    def claim(self) -> Iterator[Reservation]:
        """One request's share, given back at the end."""
        claim = Reservation(self)
        try:
            yield claim
        finally:
            self._taken -= claim.nbytes

    def take(self, nbytes: int, held: int) -> None:
        """Hold ``nbytes`` more for a request that holds ``held``. One alone is always let in.

        Raises:
            Busy: the rest is taken.
        """
        if self._taken > held and self._taken + nbytes > self._limit:
            refusal = self._busy("too many requests are being read")
            refusal.field, refusal.limit = "queue_mib", self._limit
            refusal.value = self._taken + nbytes
            raise refusal
        self.hold(nbytes)

    def hold(self, nbytes: int) -> None:
        """Hold ``nbytes`` more that are there already."""
        self._taken += nbytes


class Reservation:
    """What one request holds of a `BodyBudget`.

    It grows with the bytes that have come, not with those that were announced: whoever sends
    slowly keeps little from the others.
    """

    def __init__(self, room: BodyBudget) -> None:
        self._room = room
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        """Take room for bytes that have come.

        Raises:
            Busy: there is none.
        """
        self._room.take(nbytes, self.nbytes)
        self.nbytes += nbytes

    def hold(self, nbytes: int) -> None:
        """Count the bytes of an answer: it is not refused, but others may be while it is sent."""
        self._room.hold(nbytes)
        self.nbytes += nbytes


_DISCARD_BYTES = 64 * 1024

SINK_KEY = "sfprompt_sinks"  # in the ASGI scope's state: the connection, see `SinkHolder`


class RequestBodyBuffer:
    """Takes the rest of one body. Used on the event loop alone.

    A declared length is believed for addresses only: pages that nothing has been written to take
    no memory, and room is claimed for what has come.

    Attributes:
        complete: done when the last byte has come; fails with what stopped it.
    """

    def __init__(self, length: int, begun: bytes, claim: Reservation | None) -> None:
        self._buffer: NDArray[np.uint8] = np.empty(length, np.uint8)
        self._view = self._buffer.data
        self._filled = 0
        self._claim = claim
        self.complete: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self.write(begun)

    @property
    def is_open(self) -> bool:
        return not self.complete.done()

    @property
    def rest(self) -> memoryview:
        """Where the next bytes belong."""
        return self._view[self._filled :]

    def write(self, chunk: bytes) -> None:
        """Take bytes that have come; never more than the length, which the parser sees to."""
        self.rest[: len(chunk)] = chunk
        self.advance(len(chunk))

    def advance(self, count: int) -> None:
        """So many bytes have been written into ``rest``."""
        self._filled += count  # refused or not, they are no more to come
        try:
            if self._claim is not None:
                self._claim.add(count)
        except Busy as error:
            self.complete.set_exception(error)
            return
        if self._filled == len(self._view):
            self.complete.set_result(self._view)

    def disconnect(self) -> None:
        """The other end has gone."""
        if self.is_open:
            self.complete.set_exception(ConnectionError("the client has gone"))


class SinkHolder:
    """Where a connection keeps the sink of the body that is coming in.

    Args:
        begin: lets the connection read on, into the sink; it stops where nobody asks for what
            has come.
    """

    def __init__(self, begin: Callable[[RequestBodyBuffer], None]) -> None:
        self._begin = begin
        self.sink: RequestBodyBuffer | None = None

    def open(self, length: int, begun: bytes, claim: Reservation | None) -> RequestBodyBuffer:
        """A sink for a body of which a part has come."""
        self.sink = RequestBodyBuffer(length, begun, claim)
        self._begin(self.sink)
        return self.sink

    @property
    def open_sink(self) -> RequestBodyBuffer | None:
        return self.sink if self.sink is not None and self.sink.is_open else None


class DirectReceiver(asyncio.BufferedProtocol):
    """Takes a connection over while the rest of a body comes: from the socket into its sink.

    What nobody waits for any more, a body that was refused half-way, is read and thrown away.

    Args:
        holder: of the sink that is open now.
        owner: the connection's own protocol, which hears of everything but bytes.
        received: is told of every piece's length.
        done: is called behind the body's last byte; it gives the connection back to ``owner``.
    """

    def __init__(
        self,
        holder: SinkHolder,
        owner: asyncio.Protocol,
        received: Callable[[int], None],
        done: Callable[[], None],
    ) -> None:
        self._holder = holder
        self._sink = holder.sink
        self._left = 0 if self._sink is None else self._sink.rest.nbytes
        self._owner = owner
        self._received = received
        self._done = done

    def get_buffer(self, _sizehint: int) -> memoryview:
        sink = self._open_sink
        if sink is not None:
            return sink.rest
        return memoryview(bytearray(min(self._left, _DISCARD_BYTES)))

    def buffer_updated(self, nbytes: int) -> None:
        self._received(nbytes)
        self._left -= nbytes
        sink = self._open_sink
        if sink is not None:
            sink.advance(nbytes)
        if not self._left:
            self._done()

    def eof_received(self) -> bool | None:
        return self._owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()

    @property
    def _open_sink(self) -> RequestBodyBuffer | None:
        sink = self._holder.open_sink
        return sink if sink is self._sink else None


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
    scope: Scope, receive: Receive, limit: int, timeout_s: float, claim: Reservation | None = None
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
    scope: Scope, receive: Receive, length: int | None, limit: int, claim: Reservation | None
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
    holder: SinkHolder, receive: Receive, length: int, claim: Reservation | None
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
