"""The connection under uvicorn: counts bytes at the socket, receives large bodies directly."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from split_server.http.body import SINK_KEY, DirectReceiver, RequestBodyBuffer, SinkHolder
from split_server.storage.traffic import Meter, SocketCounter

_DIRECT_BYTES = 64 * 1024  # from here on, taking the connection over is worth it

SOCKET_KEY = "sfprompt_socket"  # in the ASGI scope's state


class _CountingTransport:
    """Passes everything on to a transport and counts what is written."""

    def __init__(self, inner: asyncio.Transport, counter: SocketCounter) -> None:
        self._inner = inner
        self._counter = counter

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._counter.sent += memoryview(data).nbytes
        self._inner.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class MeteredProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with a counter beneath it: request lines and headers count too.

    Under TLS it counts what is inside the encrypted stream, as the device does.
    """

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        self.counter = SocketCounter()
        counting = _CountingTransport(transport, self.counter)
        super().connection_made(cast(asyncio.Transport, counting))
        self.holder = SinkHolder(self._receive_into)

    def data_received(self, data: bytes) -> None:
        self._count(len(data))
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][SOCKET_KEY] = self.counter
        self.scope["state"][SINK_KEY] = self.holder

    def on_body(self, body: bytes) -> None:
        sink = self.holder.open_sink
        if sink is None:
            super().on_body(body)
        else:
            sink.write(body)

    def _receive_into(self, sink: RequestBodyBuffer) -> None:
        """Let the body's rest come: a long one past the parser, which would copy it twice."""
        if sink.rest.nbytes >= _DIRECT_BYTES:
            self._hand_over(DirectReceiver(self.holder, self, self._count, self._take_back))
        else:
            self.flow.resume_reading()

    def _take_back(self) -> None:
        self.parser = httptools.HttpRequestParser(self)  # the old one still waits for the body
        self._hand_over(self)
        self.on_message_complete()

    def _hand_over(self, protocol: asyncio.BaseProtocol) -> None:
        # An event loop may ask only when it begins to read how its protocol takes bytes.
        self.flow.pause_reading()
        self.transport.set_protocol(protocol)
        self.flow.resume_reading()

    def _count(self, nbytes: int) -> None:
        self.counter.received += nbytes

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.holder.sink is not None:
            self.holder.sink.disconnect()
        meter = self.app_state.get("meter")
        if isinstance(meter, Meter) and self.counter.last is not None:
            meter.charge(self.counter, *self.counter.last)
