"""uvicorn's connection, extended: count bytes, limit heads, receive large bodies directly."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from protocol.errors import Busy, InvalidRequest, SFPromptError, TooLarge
from split_server.federation.credentials import Identity
from split_server.http.body import BUFFERS_KEY, BufferHolder, DirectReceiver, RequestBodyBuffer
from split_server.http.connections import ConnectionTable
from split_server.storage.traffic import Meter, SocketCounter

_DIRECT_BYTES = 64 * 1024  # longer bodies bypass the HTTP parser

SOCKET_KEY = "sfprompt_socket"  # in the ASGI scope's state: the connection's `SocketCounter`

DRAINED_KEY = "sfprompt_drained"  # in the ASGI scope's state: waits for an empty write buffer

STALL_KEY = "stall_timeout_s"  # in the app's state: the setting of this name

_STALL_BYTES = 10 * 1024  # a transfer of fewer bytes in this time has stalled

CONNECTIONS_KEY = "connections"  # in the app's state: the server's `ConnectionTable`

IDENTIFY_KEY = "sfprompt_identify"  # in the ASGI scope's state: takes the sender's `Identity`

MAX_HEAD_BYTES = 32 * 1024  # of a request's line and headers

MAX_HEADERS = 100

_MAX_PIPELINED = 16  # requests that wait for a response on one connection

_RETRY_AFTER_S = 1.0


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
        if self._inner.is_closing():  # the rest of a response that nobody takes
            return
        nbytes = memoryview(data).nbytes
        self._counter.sent += nbytes
        self._written += nbytes
        self._inner.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _RefusedError(Exception):
    """Ends the parsing of a request that was refused."""


class MeteredProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, extended as the module says.

    Under TLS it counts the decrypted bytes, as the device does. It closes a connection whose
    request's line and headers exceed `MAX_HEAD_BYTES`, before the parser has stored more of them
    than one piece from the socket.
    """

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        self.counter = SocketCounter()
        self._counting = _CountingTransport(transport, self.counter)
        self._stall: asyncio.TimerHandle | None = None
        self._unparsed = 0  # bytes received since the parser has completed anything
        self._head = 0  # bytes of the request's line and headers
        super().connection_made(cast(asyncio.Transport, self._counting))
        self.holder = BufferHolder(self._receive_into)
        self._table: ConnectionTable | None = self.app_state.get(CONNECTIONS_KEY)
        address = self.client[0] if self.client else ""
        if self._table is not None and not self._table.connect(self, address):
            busy = Busy("all connections of this server are in use", retry_after_s=_RETRY_AFTER_S)
            self._refuse(busy)

    def data_received(self, data: bytes) -> None:
        self._count(len(data))
        if self.transport.is_closing():
            return
        self._unparsed += len(data)
        super().data_received(data)  # stops at an error of a callback
        if self._unparsed > MAX_HEAD_BYTES:
            self._refuse_head(self._unparsed)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self.scope["state"][SOCKET_KEY] = self.counter
        self.scope["state"][BUFFERS_KEY] = self.holder
        self.scope["state"][DRAINED_KEY] = self.flow.drain
        self.scope["state"][IDENTIFY_KEY] = self._identify

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._refuse_head(len(self.headers) + 1, MAX_HEADERS, "headers")
            raise _RefusedError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        super().on_headers_complete()
        if len(self.pipeline) > _MAX_PIPELINED:
            self._refuse(InvalidRequest("too many requests are pipelined", limit=_MAX_PIPELINED))
            raise _RefusedError

    def on_message_complete(self) -> None:
        self._unparsed = 0
        super().on_message_complete()
        if self._table is not None:
            self._table.begin(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._table is not None and self.cycle.response_complete:
            self._table.wait(self)

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg))

    def give_up(self) -> None:
        """Close the connection, without waiting for its client to read a response."""
        if self._counting.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _identify(self, identity: Identity) -> None:
        """Note the sender of a request.

        Raises:
            Busy: too many connections of this sender have requests in progress.
        """
        if self._table is not None and not self._table.identify(self, identity):
            raise Busy(
                "this participant has too many connections in use",
                field="max_participant_connections",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _count_head(self, nbytes: int) -> None:
        self._head += nbytes
        if self._head > MAX_HEAD_BYTES:
            self._refuse_head(self._head)
            raise _RefusedError

    def _refuse_head(self, value: int, limit: int = MAX_HEAD_BYTES, field: str = "head") -> None:
        self._refuse(
            TooLarge(
                "the request's line and headers are too large",
                field=field,
                limit=limit,
                value=value,
            )
        )

    def _refuse(self, error: SFPromptError) -> None:
        """Close the connection, with a typed error unless a response is in progress."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(error.to_wire()).encode()
            head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
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
        if self._table is not None:
            self._table.disconnect(self)
        if self.holder.buffer is not None:
            self.holder.buffer.disconnect()
        meter = self.app_state.get("meter")
        if isinstance(meter, Meter) and self.counter.last is not None:
            meter.charge(self.counter, *self.counter.last)
