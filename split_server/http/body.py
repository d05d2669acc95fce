"""Receive a request's body into one buffer, within a size limit and a shared memory budget."""

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
    """The memory budget of all requests that are being received or processed.

    Used on the event loop only.

    Args:
        limit: in bytes.
        busy_error: creates the error, with an estimate of when to retry.
    """

    def __init__(self, limit: int, busy_error: Callable[[str], Busy]) -> None:
        self._limit = limit
        self._busy_error = busy_error
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes in use."""
        return self._taken

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """Open one request's reservation, released at the end."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            self._taken -= reservation.nbytes

    def take(self, nbytes: int, reserved: int) -> None:
        """Take ``nbytes`` more for a request that has ``reserved`` already.

        A request that is alone always succeeds.

        Raises:
            Busy: other requests use the budget.
        """
        if self._taken > reserved and self._taken + nbytes > self._limit:
            refusal = self._busy_error("the server is receiving too many requests")
            refusal.field, refusal.limit = "queue_mib", self._limit
            refusal.value = self._taken + nbytes
            raise refusal
        self.add(nbytes)

    def add(self, nbytes: int) -> None:
        """Count ``nbytes`` that are in memory already."""
        self._taken += nbytes


class Reservation:
    """One request's part of a `BodyBudget`.

    It grows with the received bytes, not with the declared length: a slow sender takes little from
    other requests.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        """Reserve memory for received bytes.

        Raises:
            Busy: the budget is used up.
        """
        self._budget.take(nbytes, self.nbytes)
        self.nbytes += nbytes

    def add_response(self, nbytes: int) -> None:
        """Count a response's bytes; never refused, but others may be while it is sent."""
        self._budget.add(nbytes)
        self.nbytes += nbytes


_DISCARD_BYTES = 64 * 1024

BUFFERS_KEY = "sfprompt_buffers"  # in the ASGI scope's state: the connection's `BufferHolder`


class RequestBodyBuffer:
    """Receives the rest of one body. Used on the event loop only.

    The declared length reserves addresses only: pages that were never written use no memory, and
    the budget counts received bytes.

    Attributes:
        complete: resolves with the body after its last byte; fails if receiving stops.
    """

    def __init__(self, length: int, received: bytes, reservation: Reservation | None) -> None:
        self._buffer: NDArray[np.uint8] = np.empty(length, np.uint8)
        self._view = self._buffer.data
        self._filled = 0
        self._reservation = reservation
        self.complete: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self.write(received)

    @property
    def is_open(self) -> bool:
        """Whether bytes are still expected."""
        return not self.complete.done()

    @property
    def rest(self) -> memoryview:
        """The unfilled part."""
        return self._view[self._filled :]

    def write(self, chunk: bytes) -> None:
        """Copy received bytes; the HTTP parser ensures that they do not exceed the length."""
        self.rest[: len(chunk)] = chunk
        self.advance(len(chunk))

    def advance(self, count: int) -> None:
        """Count bytes that were written into ``rest``."""
        self._filled += count  # even if refused: they will not come again
        try:
            if self._reservation is not None:
                self._reservation.add(count)
        except Busy as error:
            self.complete.set_exception(error)
            return
        if self._filled == len(self._view):
            self.complete.set_result(self._view)

    def disconnect(self) -> None:
        """Fail: the client has disconnected."""
        if self.is_open:
            self.complete.set_exception(ConnectionError("the client has disconnected"))


class BufferHolder:
    """Stores a connection's current body buffer.

    Args:
        begin: resumes reading, into the buffer. A connection pauses until its body is read.
    """

    def __init__(self, begin: Callable[[RequestBodyBuffer], None]) -> None:
        self._begin = begin
        self.buffer: RequestBodyBuffer | None = None

    def open(
        self, length: int, received: bytes, reservation: Reservation | None
    ) -> RequestBodyBuffer:
        """Open a buffer for a body whose first bytes were received already."""
        self.buffer = RequestBodyBuffer(length, received, reservation)
        self._begin(self.buffer)
        return self.buffer

    @property
    def open_buffer(self) -> RequestBodyBuffer | None:
        """The buffer, if it still expects bytes."""
        return self.buffer if self.buffer is not None and self.buffer.is_open else None


class DirectReceiver(asyncio.BufferedProtocol):
    """Receives the rest of a body from the socket straight into its buffer.

    The rest of a body that was refused half-way is read and discarded.

    Args:
        holder: has the current buffer.
        owner: the connection's HTTP protocol; handles every event but received bytes.
        received: called with the length of every piece.
        done: called after the body's last byte; gives the connection back to ``owner``.
    """

    def __init__(
        self,
        holder: BufferHolder,
        owner: asyncio.Protocol,
        received: Callable[[int], None],
        done: Callable[[], None],
    ) -> None:
        self._holder = holder
        self._buffer = holder.buffer
        self._left = 0 if self._buffer is None else self._buffer.rest.nbytes
        self._owner = owner
        self._received = received
        self._done = done

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return the memory for the next bytes."""
        buffer = self._open_buffer
        if buffer is not None:
            return buffer.rest
        return memoryview(bytearray(min(self._left, _DISCARD_BYTES)))

    def buffer_updated(self, nbytes: int) -> None:
        """Count received bytes."""
        self._received(nbytes)
        self._left -= nbytes
        buffer = self._open_buffer
        if buffer is not None:
            buffer.advance(nbytes)
        if not self._left:
            self._done()

    def eof_received(self) -> bool | None:
        """Pass the event to the owner."""
        return self._owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the event to the owner."""
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass the event to the owner."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Pass the event to the owner."""
        self._owner.resume_writing()

    @property
    def _open_buffer(self) -> RequestBodyBuffer | None:
        buffer = self._holder.open_buffer
        return buffer if buffer is self._buffer else None


def declared_length(scope: Scope) -> int | None:
    """Return the request's Content-Length, or None if it has none.

    Raises:
        InvalidField: it is not a number.
    """
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise InvalidField(
                    "the content length is not a number",
                    field="content-length",
                    limit="digits",
                    value=repr(value),
                )
            return int(value)
    return None


async def read_body(
    scope: Scope,
    receive: Receive,
    limit: int,
    timeout_s: float,
    reservation: Reservation | None = None,
) -> bytearray | memoryview:
    """Receive the whole body into one writable buffer.

    Args:
        limit: of the body, in bytes.
        timeout_s: for the whole body.
        reservation: grows with the received bytes.

    Raises:
        TooLarge: the declared length or the body exceeds ``limit``.
        MalformedFrame: the body ended early or did not arrive in time.
        Busy: the memory budget is used up.
    """
    length = declared_length(scope)
    if length is not None and length > limit:
        raise too_large(limit, length)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(scope, receive, length, limit, reservation)
    except TimeoutError:
        raise too_slow(timeout_s) from None


async def _read(
    scope: Scope,
    receive: Receive,
    length: int | None,
    limit: int,
    reservation: Reservation | None,
) -> bytearray | memoryview:
    holder: BufferHolder | None = scope.get("state", {}).get(BUFFERS_KEY)
    if holder is not None and length is not None:
        return await _read_directly(holder, receive, length, reservation)
    # Without a buffer of the connection, the body grows with the received bytes.
    body = bytearray()
    while True:
        message = await _next_message(receive)
        chunk = message.get("body", b"")
        if len(body) + len(chunk) > limit:
            raise too_large(limit, len(body) + len(chunk))
        if reservation is not None:
            reservation.add(len(chunk))
        body += chunk
        if not message.get("more_body", False):
            break
    if length is not None and len(body) != length:
        raise MalformedFrame("the body ended early", field="body", limit=length, value=len(body))
    return body


async def _read_directly(
    holder: BufferHolder, receive: Receive, length: int, reservation: Reservation | None
) -> memoryview:
    """Receive the body into a buffer of the connection, after the bytes that uvicorn has read."""
    first = await _next_message(receive)
    buffer = holder.open(length, first.get("body", b""), reservation)
    try:
        if first.get("more_body", False):
            await buffer.complete
            while (await _next_message(receive)).get("more_body", False):  # until uvicorn's end
                pass
        if not buffer.complete.done():
            raise MalformedFrame("the body ended early", field="body", limit=length)
        return buffer.complete.result()
    except ConnectionError:
        raise ClientDisconnect from None
    finally:
        holder.buffer = None


async def _next_message(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


def too_large(limit: int, value: int) -> TooLarge:
    """Create the error for a body that exceeds its limit."""
    return TooLarge(
        "the request's body is too large",
        field="body",
        limit=limit,
        value=value,
        hint="send smaller batches, or raise --max-frame-mib on the server",
    )


def too_slow(timeout_s: float) -> MalformedFrame:
    """Create the error for a body that did not arrive in time."""
    return MalformedFrame("the body did not arrive in time", field="body", limit=timeout_s)
