"""uvicorn's connection, extended: count bytes at the socket, receive large bodies directly."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from split_server.http.body import BUFFERS_KEY, BufferHolder, DirectReceiver, RequestBodyBuffer
from split_server.storage.traffic import Meter, SocketCounter

_DIRECT_BYTES = 64 * 1024  # longer bodies bypass the HTTP parser

SOCKET_KEY = "sfprompt_socket"  # in the ASGI scope's state: the connection's `SocketCounter`

DRAINED_KEY = "sfprompt_drained"  # in the ASGI scope's state: waits for an empty write buffer

STALL_KEY = "stall_timeout_s"  # in the app's state: the setting of this name

_STALL_BYTES = 10 * 1024  # a transfer of fewer bytes in this time has stalled


class _CountingTransport:
    """Delegates to a transport and counts written bytes."""

    def __init__(self, inner: asyncio.Transport, counter: SocketCounter) -> None:
        self._inner = inner
        self._counter = counter
        self._written = 0

    @property
    def delivered(self) -> int:
        """Bytes that the operating system has accepted since the connection began."""
        return self._written - self._inner.get_write_buffer_size()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        nbytes = memoryview(data).nbytes
        self._counter.sent += nbytes
        self._written += nbytes
        self._inner.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class MeteredProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, extended as the module says.

    Under TLS it counts the decrypted bytes, as the device does.
    """

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        self.counter = SocketCounter()
        self._counting = _CountingTransport(transport, self.counter)
        self._stall: asyncio.TimerHandle | None = None
        super().connection_made(cast(asyncio.Transport, self._counting))
        self.holder = BufferHolder(self._receive_into)

    def data_received(self, data: bytes) -> None:
        self._count(len(data))
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][SOCKET_KEY] = self.counter
        self.scope["state"][BUFFERS_KEY] = self.holder
        self.scope["state"][DRAINED_KEY] = self.flow.drain

    def on_body(self, body: bytes) -> None:
        buffer = self.holder.open_buffer
        if buffer is None:
            super().on_body(body)
        else:
            buffer.write(body)

    def _receive_into(self, buffer: RequestBodyBuffer) -> None:
        """Resume reading. A long rest bypasses the parser, which would copy it twice."""
        if buffer.rest.nbytes >= _DIRECT_BYTES:
            self._hand_over(DirectReceiver(self.holder, self, self._count, self._take_back))
        else:
            self.flow.resume_reading()

    def _take_back(self) -> None:
        self.parser = httptools.HttpRequestParser(self)  # the old one still expects the body
        self._hand_over(self)
        self.on_message_complete()

    def _hand_over(self, protocol: asyncio.BaseProtocol) -> None:
        # An event loop may look up the protocol's receiving method only when reading starts.
        self.flow.pause_reading()
        self.transport.set_protocol(protocol)
        self.flow.resume_reading()

    def _count(self, nbytes: int) -> None:
        self.counter.received += nbytes

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_delivery()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _await_delivery(self) -> None:
        """Close the connection if the client reads too little of its responses in time."""
        seconds = self.app_state.get(STALL_KEY)
        if seconds is not None:
            before = self._counting.delivered
            self._stall = self.loop.call_later(seconds, self._check_delivery, before)

    def _check_delivery(self, before: int) -> None:
        if self._counting.delivered - before < _STALL_BYTES:
            self.transport.abort()  # `close` would wait for the client
        else:
            self._await_delivery()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)
        if self.holder.buffer is not None:
            self.holder.buffer.disconnect()
        meter = self.app_state.get("meter")
        if isinstance(meter, Meter) and self.counter.last is not None:
            meter.charge(self.counter, *self.counter.last)
