"""A request's body on its shortest way: from the parser into the buffer that is decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from protocol.errors import Busy
from split_server.routes.room import Claim

_DISCARD_BYTES = 64 * 1024
SINK_KEY = "sfprompt_sinks"  # in the ASGI scope's state: the connection, see `SinkHolder`


class BodySink:
    """Takes the rest of one body. Used on the event loop alone.

    A declared length is believed for addresses only: pages that nothing has been written to take
    no memory, and room is claimed for what has come.

    Attributes:
        complete: done when the last byte has come; fails with what stopped it.
    """

    def __init__(self, length: int, begun: bytes, claim: Claim | None) -> None:
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

    def __init__(self, begin: Callable[[BodySink], None]) -> None:
        self._begin = begin
        self.sink: BodySink | None = None

    def open(self, length: int, begun: bytes, claim: Claim | None) -> BodySink:
        """A sink for a body of which a part has come."""
        self.sink = BodySink(length, begun, claim)
        self._begin(self.sink)
        return self.sink

    @property
    def open_sink(self) -> BodySink | None:
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
    def _open_sink(self) -> BodySink | None:
        sink = self._holder.open_sink
        return sink if sink is self._sink else None
