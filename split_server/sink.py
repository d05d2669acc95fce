"""A request's body on its shortest way: from the parser into the buffer that is decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from protocol.errors import Busy
from split_server.routes.room import Claim

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

    def write(self, chunk: bytes) -> None:
        """Take bytes that have come; never more than the length, which the parser sees to."""
        end = self._filled + len(chunk)
        try:
            if self._claim is not None:
                self._claim.add(len(chunk))
        except Busy as error:
            self.complete.set_exception(error)
            return
        self._view[self._filled : end] = chunk
        self._filled = end
        if end == len(self._view):
            self.complete.set_result(self._view)

    def disconnect(self) -> None:
        """The other end has gone."""
        if self.is_open:
            self.complete.set_exception(ConnectionError("the client has gone"))


class SinkHolder:
    """Where a connection keeps the sink of the body that is coming in.

    Args:
        resume: lets the connection read on; it stops where nobody asks for what has come.
    """

    def __init__(self, resume: Callable[[], None]) -> None:
        self._resume = resume
        self.sink: BodySink | None = None

    def open(self, length: int, begun: bytes, claim: Claim | None) -> BodySink:
        """A sink for a body of which a part has come."""
        self.sink = BodySink(length, begun, claim)
        self._resume()
        return self.sink

    @property
    def open_sink(self) -> BodySink | None:
        return self.sink if self.sink is not None and self.sink.is_open else None
