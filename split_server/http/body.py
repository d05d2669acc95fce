"""Receive a request's body into one buffer, within a size limit and a shared memory budget."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from protocol.errors import Busy, InvalidField, MalformedFrame, TooLarge
from split_server.http.budget import Reservation

_DISCARD_BYTES = 64 * 1024

_STALL_BYTES = 10 * 1024  # a transfer of fewer bytes in ``stall_s`` has stalled

_MAX_LENGTH_DIGITS = 18

BUFFERS_KEY = "sfprompt_buffers"  # in the ASGI scope's state: the connection's `BufferHolder`


class RequestBodyBuffer:
    """Receives the rest of one body. Used on the event loop only.

    The declared length allocates address space only. Pages that were never written use no memory,
    and the budget counts the received bytes.

    Args:
        length: declared length of the body in bytes.
        received: the bytes that were already received.
        reservation: grows with the received bytes; None: they are not counted.

    Attributes:
        complete: resolves to the body after its last byte, or to the error that ended it.
    """

    def __init__(self, length: int, received: bytes, reservation: Reservation | None) -> None:
        self._buffer: NDArray[np.uint8] = np.empty(length, np.uint8)
        self._view = self._buffer.data
        self._filled = 0
        self._reservation = reservation
        loop = asyncio.get_running_loop()
        self.complete: asyncio.Future[memoryview] = loop.create_future()
        if reservation is not None:
            reservation.on_cancel = self._cancel
        self.write(received)

    @property
    def is_open(self) -> bool:
        """Whether bytes are still expected."""
        return not self.complete.done()

    @property
    def filled(self) -> int:
        """Bytes received so far."""
        return self._filled

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
        self._filled += count  # also if they are refused: they are not sent again
        try:
            if self._reservation is not None:
                self._reservation.add(count)
        except Busy as error:
            self.complete.set_exception(error)
            return
        if self._filled == len(self._view):
            if self._reservation is not None:
                self._reservation.on_cancel = None  # a complete body is not cancelled
            self.complete.set_result(self._view)

    def _cancel(self, error: Busy) -> None:
        """Fail with this error, because other requests need the memory. Thread-safe."""
        self.complete.get_loop().call_soon_threadsafe(self._fail, error)

    def _fail(self, error: Busy) -> None:
        if self.is_open:
            self.complete.set_exception(error)

    def disconnect(self) -> None:
        """Fail, because the client has disconnected."""
        if self.is_open:
            self.complete.set_exception(ConnectionError("the client has disconnected"))


class BufferHolder:
    """Stores a connection's current body buffer.

    Args:
        begin: resumes reading into a buffer. A connection is paused until its body is read.
    """

    def __init__(self, begin: Callable[[RequestBodyBuffer], None]) -> None:
        self._begin = begin
        self.buffer: RequestBodyBuffer | None = None

    def open(
        self, length: int, received: bytes, reservation: Reservation | None
    ) -> RequestBodyBuffer:
        """Open a buffer for a body.

        Args:
            length: declared length of the body in bytes.
            received: the bytes that were already received.
            reservation: grows with the received bytes; None: they are not counted.
        """
        self.buffer = RequestBodyBuffer(length, received, reservation)
        self._begin(self.buffer)
        return self.buffer

    @property
    def open_buffer(self) -> RequestBodyBuffer | None:
        """The buffer, if it still expects bytes."""
        return self.buffer if self.buffer is not None and self.buffer.is_open else None


class DirectReceiver(asyncio.BufferedProtocol):
    """Receives the rest of a body from the socket directly into its buffer.

    If the body is refused meanwhile, the rest is received and discarded.

    Args:
        holder: holds the current buffer.
        owner: HTTP protocol of the connection; handles all events except received bytes.
        received: called with the length of each received piece.
        done: called after the last byte of the body; returns the connection to ``owner``.
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
    """Return the Content-Length of a request; None: it has none.

    Raises:
        InvalidField: the header is not a number.
    """
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit() or len(value) > _MAX_LENGTH_DIGITS:
                raise InvalidField(
                    "the content length must be a number",
                    field="content-length",
                    limit=f"up to {_MAX_LENGTH_DIGITS} digits",
                    value=repr(value[:40]),
                )
            return int(value)
    return None


async def read_body(
    scope: Scope,
    receive: Receive,
    limit: int,
    timeout_s: float,
    reservation: Reservation | None = None,
    stall_s: float = math.inf,
) -> bytearray | memoryview:
    """Receive the whole body into one writable buffer.

    Args:
        scope: ASGI scope of the request.
        receive: ASGI function that receives the body.
        limit: maximum length of the body, in bytes.
        timeout_s: time for the whole body.
        reservation: grows with the received bytes; None: they are not counted.
        stall_s: time in which at least 10 KiB or the rest must arrive.

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
            return await _read(scope, receive, length, limit, reservation, stall_s)
    except TimeoutError:
        raise too_slow(timeout_s) from None


async def _read(
    scope: Scope,
    receive: Receive,
    length: int | None,
    limit: int,
    reservation: Reservation | None,
    stall_s: float,
) -> bytearray | memoryview:
    holder: BufferHolder | None = scope.get("state", {}).get(BUFFERS_KEY)
    if holder is not None and length is not None:
        return await _read_directly(holder, receive, length, reservation, stall_s)
    # Without a connection buffer, the body grows with the received bytes.
    body = bytearray()
    while True:
        async with asyncio.timeout(_finite(stall_s)):
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
    holder: BufferHolder,
    receive: Receive,
    length: int,
    reservation: Reservation | None,
    stall_s: float,
) -> memoryview:
    """Receive the body into a buffer of the connection, after the bytes that uvicorn has read."""
    async with asyncio.timeout(_finite(stall_s)):
        first = await _next_message(receive)
    buffer = holder.open(length, first.get("body", b""), reservation)
    try:
        if first.get("more_body", False):
            await _completion(buffer, stall_s)
            while (await _next_message(receive)).get("more_body", False):
                pass  # until uvicorn's last message
        if not buffer.complete.done():
            raise MalformedFrame("the body ended early", field="body", limit=length)
        return buffer.complete.result()
    except ConnectionError:
        raise ClientDisconnect from None
    finally:
        holder.buffer = None
        if reservation is not None:
            reservation.on_cancel = None  # a reference cycle would keep the buffer in memory


async def _completion(buffer: RequestBodyBuffer, stall_s: float) -> None:
    """Wait until a buffer is full.

    Raises:
        TimeoutError: fewer than `_STALL_BYTES` came within ``stall_s``.
    """
    while True:
        before = buffer.filled
        done, _ = await asyncio.wait({buffer.complete}, timeout=_finite(stall_s))
        if done:
            buffer.complete.result()
            return
        if buffer.filled - before < _STALL_BYTES:
            raise TimeoutError


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


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
