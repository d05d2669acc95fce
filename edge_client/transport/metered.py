"""An httpx transport over ``http.client`` that counts every byte at the socket.

httpx's own engine parses and copies each chunk in Python; for tensors of a megabyte that is most
of the client's time. This one writes the request's pieces straight to the socket and reads the
response into one buffer, and it is where the meter sits: below HTTP, so headers count. What TLS
adds below it does not. A simulated link, if there is one, sits at the same place.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from typing import Any, cast

import httpx
import numpy as np

from edge_client.transport.link import Line, Link
from protocol.errors import TooLarge
from protocol.limits import DEFAULT_LIMITS
from protocol.traffic import Traffic

BODY_EXTENSION = "sfprompt_body"  # the response's body as one writable buffer
Body = bytearray | memoryview
_BROKEN = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)  # the other end is gone
_READ_BYTES = 1024 * 1024  # at a time, of a body whose length is not announced
# A router between the two may forget a connection that is silent while the device computes.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # seconds, seconds, times


class _CountingSocket(io.RawIOBase):
    """What ``http.client`` needs of a socket, with a count of the bytes that pass."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self.sent = 0
        self.received = 0

    def begin_exchange(self) -> None:
        """Nothing: only a simulated link asks when a request begins."""

    def sendall(self, data: bytes | memoryview) -> None:
        # Not the socket's own: its time-out is for all of ``data``, however slow the link.
        rest = memoryview(data).cast("B")
        while rest.nbytes:
            count = self._inner.send(rest)
            self.sent += count
            rest = rest[count:]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._inner.recv_into(buffer)
        self.received += count
        return count

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Borrowed(self), buffer_size=64 * 1024)

    def settimeout(self, seconds: float | None) -> None:
        self._inner.settimeout(seconds)

    def close(self) -> None:
        """Nothing: ``http.client`` closes ahead of the body when a connection ends with it."""

    def shut(self) -> None:
        self._inner.close()

    @property
    def silent(self) -> bool:
        """Whether nothing has come that nobody has read: not even the connection's end."""
        poll = select.poll()
        poll.register(self._inner, select.POLLIN)
        return not poll.poll(0)


class _SlowedSocket(_CountingSocket):
    """The same at the end of a simulated line, in pieces that each wait for their turn."""

    def __init__(self, inner: socket.socket, line: Line) -> None:
        super().__init__(inner)
        self._line = line
        self._exchange = line.exchange()

    def begin_exchange(self) -> None:
        self._exchange = self._line.exchange()

    def sendall(self, data: bytes | memoryview) -> None:
        rest, most = memoryview(data).cast("B"), self._line.up.piece_bytes
        while rest.nbytes:
            piece, rest = rest[:most], rest[most:]
            self._exchange.send(piece.nbytes)
            super().sendall(piece)

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(memoryview(buffer)[: self._line.down.piece_bytes])
        self._exchange.receive(count)
        return count


class _Borrowed(io.RawIOBase):
    """A reader that leaves the socket open when a response is done with it."""

    def __init__(self, source: _CountingSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.readinto(buffer)


class _Connection:
    """One connection to one origin, kept alive from request to request."""

    def __init__(
        self, url: httpx.URL, tls: ssl.SSLContext | None, timeout: float, line: Line | None
    ) -> None:
        host, port = url.host, url.port
        if url.scheme == "https":
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=timeout, context=tls
            )
        else:
            self._http = http.client.HTTPConnection(host, port, timeout=timeout)
        round_trips = 2 if url.scheme == "https" else 1
        with contextlib.nullcontext() if line is None else line.opening(round_trips):
            self._http.connect()
        plain = cast(socket.socket, self._http.sock)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            if hasattr(socket, option):
                plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.socket = _CountingSocket(plain) if line is None else _SlowedSocket(plain, line)
        self._http.sock = self.socket
        self.used = False

    def exchange(
        self, request: httpx.Request, timeout: float, max_body_bytes: int
    ) -> tuple[http.client.HTTPResponse, Body]:
        self.socket.settimeout(timeout)
        self.socket.begin_exchange()
        target = request.url.raw_path.decode("ascii")
        self._http.putrequest(request.method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.raw:
            self._http.putheader(name, value)
        complete = True
        try:
            self._http.endheaders()
            for piece in cast("Iterable[bytes]", request.stream):
                if piece:
                    self.socket.sendall(piece)
        except _BROKEN:
            # A server may refuse a request before it has read all of it: its answer is waiting.
            complete = False
        response = self._http.getresponse()
        try:
            body = _read_body(response, max_body_bytes)
        except ValueError as error:  # http.client believes in chunks of negative length
            raise http.client.HTTPException(f"no HTTP: {error}") from error
        self.used = True
        if response.will_close or not complete:
            self.close()
        return response, body

    @property
    def closed(self) -> bool:
        return self._http.sock is None

    def close(self) -> None:
        self._http.close()
        self.socket.shut()


def _read_body(response: http.client.HTTPResponse, most: int) -> Body:
    if response.length is None:
        grown = bytearray()
        while chunk := response.read(_READ_BYTES):
            grown += chunk
            if len(grown) > most:
                raise _too_large(most, len(grown))
        return grown
    if response.length > most:
        raise _too_large(most, response.length)
    body: memoryview = np.empty(response.length, np.uint8).data  # pages that nobody has to clear
    filled = 0
    while filled < len(body):
        count = response.readinto(body[filled:])
        if count == 0:
            raise http.client.IncompleteRead(bytes(body[:filled]), len(body) - filled)
        filled += count
    response.read()  # lets http.client see the end of the message
    return body


class MeteredTransport(httpx.BaseTransport):
    """Sends httpx requests over kept-alive connections and counts their bytes by phase.

    Args:
        tls: the context of ``https`` connections; None: the system's trust store.
        connect_timeout_s: seconds to wait for a connection.
        max_body_bytes: of one response.
        prefix: what precedes the protocol's own paths in the server's address.
        link: take the time that this link would, shared by all connections; None: just loopback
            or the real network.

    A request whose kept-alive connection turns out to be dead is sent once more on a new one;
    that is safe because every request of the protocol may be repeated.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = 10.0,
        max_body_bytes: int = DEFAULT_LIMITS.max_frame_bytes,
        prefix: str = "",
        link: Link | None = None,
    ) -> None:
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._max_body_bytes = max_body_bytes
        self._prefix = prefix.rstrip("/")
        self._line = None if link is None else Line(link)
        self._idle: dict[tuple[str, str, int | None], list[_Connection]] = {}
        self._lock = threading.Lock()
        self._traffic = Traffic()

    def traffic(self) -> Traffic:
        """A copy of what has been counted so far."""
        with self._lock:
            return self._traffic.copy()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and read its whole response.

        Raises:
            httpx.ConnectError: no connection could be made (also: a certificate was refused).
            httpx.TimeoutException: the server did not answer in time.
            httpx.ReadError: the connection broke in the middle.
            TooLarge: the response is over ``max_body_bytes``.
        """
        timeouts = request.extensions.get("timeout", {})
        read_timeout = timeouts.get("read") or 60.0
        connection = self._take(request)
        try:
            received = connection.socket.received
            try:
                response, body = self._exchange(connection, request, read_timeout)
            except _BROKEN:
                stale = connection.used and connection.socket.received == received
                if not stale:
                    raise
                connection = self._open(request)
                response, body = self._exchange(connection, request, read_timeout)
        except TimeoutError as error:
            raise httpx.ReadTimeout(
                f"no answer within {read_timeout:g} s", request=request
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise httpx.ReadError(str(error) or type(error).__name__, request=request) from error
        if not connection.closed:
            with self._lock:
                self._idle.setdefault(_origin(request.url), []).append(connection)
        return httpx.Response(
            response.status,
            headers=[
                (name.encode("latin-1"), value.encode("latin-1"))
                for name, value in response.getheaders()
            ],
            stream=_Body(body),
            extensions={BODY_EXTENSION: body},
        )

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _exchange(
        self, connection: _Connection, request: httpx.Request, timeout: float
    ) -> tuple[http.client.HTTPResponse, Body]:
        sent, received = connection.socket.sent, connection.socket.received
        try:
            return connection.exchange(request, timeout, self._max_body_bytes)
        except BaseException:
            connection.close()
            raise
        finally:
            with self._lock:
                self._traffic.add(
                    request.url.path.removeprefix(self._prefix),
                    connection.socket.sent - sent,
                    connection.socket.received - received,
                )

    def _take(self, request: httpx.Request) -> _Connection:
        """A kept-alive connection, or a new one.

        Those that the server has ended meanwhile are closed: whatever is still sent into one
        counts here, and never arrives.
        """
        while (connection := self._idle_one(_origin(request.url))) is not None:
            if connection.socket.silent:
                return connection
            connection.close()
        return self._open(request)

    def _idle_one(self, origin: tuple[str, str, int | None]) -> _Connection | None:
        with self._lock:
            idle = self._idle.get(origin)
            return idle.pop() if idle else None

    def _open(self, request: httpx.Request) -> _Connection:
        if self._tls is None and request.url.scheme == "https":
            self._tls = ssl.create_default_context()  # reads the trust store: once is enough
        try:
            return _Connection(request.url, self._tls, self._connect_timeout_s, self._line)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error), request=request) from error
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error


class _Body(httpx.SyncByteStream):
    def __init__(self, body: Body) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield bytes(self._body)


def _too_large(limit: int, value: int) -> TooLarge:
    return TooLarge("the server's answer is too large", field="body", limit=limit, value=value)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
