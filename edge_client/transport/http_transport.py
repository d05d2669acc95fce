"""An httpx transport that counts every byte at the socket.

httpx's default transport parses and copies each chunk in Python, which takes most of the client's
time for tensors of a megabyte. This one writes the request's pieces to the socket and reads the
response into one buffer. Bytes are counted below HTTP and above TLS: headers count, TLS's own
bytes do not. A simulated link acts at the same place.
"""

from __future__ import annotations

import math
import ssl
import threading
from collections.abc import Callable, Iterator

import httpx

from edge_client.transport.connection import BROKEN, Connection, Patience
from edge_client.transport.link import Line, Link
from edge_client.transport.response import Body, BrokenResponse, RawResponse
from protocol.limits import DEFAULT_LIMITS
from protocol.traffic import Traffic

BODY_EXTENSION = "sfprompt_body"  # the response's body as one writable buffer

_Origin = tuple[bytes, bytes, int | None]


class MeteredTransport(httpx.BaseTransport):
    """Sends httpx requests over kept-alive connections and counts their bytes by phase.

    If a kept-alive connection turns out to be dead, its request is sent again on a new one. That
    is safe because every request of the protocol may be repeated.

    Args:
        tls: the context of ``https`` connections; None: the system's trust store.
        connect_timeout_s: seconds to wait for a connection.
        max_body_bytes: of one response.
        prefix: path in the server's address that precedes the protocol's paths.
        link: simulated link, shared by all connections; None: the real network.
        on_silence: called with the seconds in which no byte of a response came.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = 10.0,
        max_body_bytes: int = DEFAULT_LIMITS.max_frame_bytes,
        prefix: str = "",
        link: Link | None = None,
        on_silence: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._max_body_bytes = max_body_bytes
        self._prefix = prefix.rstrip("/")
        self._line = None if link is None else Line(link)
        self._on_silence = on_silence
        self._idle: dict[_Origin, list[Connection]] = {}
        self._lock = threading.Lock()
        self._traffic = Traffic()

    def traffic(self) -> Traffic:
        """Return a copy of the counts so far."""
        with self._lock:
            return self._traffic.copy()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and read its whole response.

        Raises:
            httpx.ConnectError: the connection failed, or a certificate was refused.
            httpx.TimeoutException: the server did not answer in time.
            httpx.ReadError: the connection broke during the exchange.
            TooLarge: the response is over ``max_body_bytes``.
        """
        limits = request.extensions.get("timeout", {})
        patience = Patience(
            limits.get("read") or 60.0, limits.get("silence") or math.inf, self._on_silence
        )
        origin = _origin(request.url)
        connection = self._take(origin, request)
        try:
            received = connection.socket.received
            try:
                response = self._exchange(connection, request, patience)
            except BROKEN:
                stale = connection.used and connection.socket.received == received
                if not stale:
                    raise
                connection = self._open(request)
                response = self._exchange(connection, request, patience)
        except TimeoutError as error:
            raise httpx.ReadTimeout(
                f"no response within {patience.seconds:g} s", request=request
            ) from error
        except (OSError, BrokenResponse) as error:
            raise httpx.ReadError(str(error) or type(error).__name__, request=request) from error
        if not connection.closed:
            with self._lock:
                self._idle.setdefault(origin, []).append(connection)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response.body),
            extensions={BODY_EXTENSION: response.body},
        )

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _exchange(
        self, connection: Connection, request: httpx.Request, patience: Patience
    ) -> RawResponse:
        sent, received = connection.socket.sent, connection.socket.received
        try:
            return connection.exchange(request, patience, self._max_body_bytes)
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

    def _take(self, origin: _Origin, request: httpx.Request) -> Connection:
        """Take a kept-alive connection, or open one.

        Connections that the server has closed meanwhile are dropped here: bytes sent on one would
        be counted and never arrive.
        """
        while (connection := self._pop_idle(origin)) is not None:
            if connection.socket.is_silent:
                return connection
            connection.close()
        return self._open(request)

    def _pop_idle(self, origin: _Origin) -> Connection | None:
        with self._lock:
            idle = self._idle.get(origin)
            return idle.pop() if idle else None

    def _open(self, request: httpx.Request) -> Connection:
        secure = request.url.scheme == "https"
        if secure and self._tls is None:
            self._tls = ssl.create_default_context()  # reads the trust store, so only once
        tls = self._tls if secure else None
        try:
            return Connection(request.url, tls, self._connect_timeout_s, self._line)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error), request=request) from error
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error


class _Body(httpx.SyncByteStream):
    def __init__(self, body: Body) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield bytes(self._body)


def _origin(url: httpx.URL) -> _Origin:
    return url.raw_scheme, url.raw_host, url.port
