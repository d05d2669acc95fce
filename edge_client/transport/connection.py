"""One connection to one origin, kept alive between requests, with a count of its bytes."""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, cast

import httpx

from edge_client.transport.link import Line
from edge_client.transport.response import RawResponse, read_response
from protocol.errors import InvalidField

Buffer = bytes | bytearray | memoryview

# Errors that say that the other end has closed the connection.
BROKEN: Final = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)

_PORTS: Final = {"http": 80, "https": 443}

# A router may drop a connection that is silent while the device computes or waits.
_KEEP_ALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}  # s, s, times

_SMALL_BYTES = 4096  # a body piece up to this size is sent together with the headers


@dataclass(frozen=True)
class Patience:
    """How long to wait for the other end to take or send a byte.

    Attributes:
        seconds: until the exchange is given up.
        silence_s: until a person is told.
        on_silence: tells, with the seconds so far.
    """

    seconds: float
    silence_s: float = math.inf
    on_silence: Callable[[float], None] = lambda _seconds: None


class CountingSocket:
    """A socket's sending and receiving, with a count of the bytes."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self._patience = Patience(0.0)  # as the socket has it
        self.sent = 0
        self.received = 0

    def begin_exchange(self) -> None:
        """Mark the start of a request; only a simulated link needs it."""

    def send_all(self, data: Buffer) -> None:
        """Send all of ``data``; the timeout applies to each part of it."""
        rest = memoryview(data).cast("B")
        while rest.nbytes:
            count = self._patiently(lambda: self._inner.send(rest))  # noqa: B023 - called at once
            self.sent += count
            rest = rest[count:]

    def receive_into(self, buffer: memoryview) -> int:
        """Receive some bytes into the buffer and return their number; 0: the peer has closed."""
        count = self._patiently(lambda: self._inner.recv_into(buffer))
        self.received += count
        return count

    def set_patience(self, patience: Patience) -> None:
        self._patience = patience
        self._inner.settimeout(min(patience.seconds, patience.silence_s))

    def _patiently(self, move: Callable[[], int]) -> int:
        """Move some bytes; tell a person when nothing moves, and give up later."""
        patience, waited = self._patience, 0.0
        while True:
            try:
                return move()
            except TimeoutError:
                waited += self._inner.gettimeout() or 0.0
                if waited >= patience.seconds:
                    raise
                patience.on_silence(waited)

    def close(self) -> None:
        self._inner.close()

    @property
    def is_silent(self) -> bool:
        """Whether nothing waits to be read, the connection's end included."""
        if isinstance(self._inner, ssl.SSLSocket) and self._inner.pending():
            return False  # TLS has already read it from the socket
        poll = select.poll()
        poll.register(self._inner, select.POLLIN)
        return not poll.poll(0)


class SlowedSocket(CountingSocket):
    """A counting socket on a simulated line: data pass in pieces, each at its time."""

    def __init__(self, inner: socket.socket, line: Line) -> None:
        super().__init__(inner)
        self._line = line
        self._exchange = line.exchange()

    def begin_exchange(self) -> None:
        self._exchange = self._line.exchange()

    def send_all(self, data: Buffer) -> None:
        rest, piece_bytes = memoryview(data).cast("B"), self._line.up.piece_bytes
        while rest.nbytes:
            piece, rest = rest[:piece_bytes], rest[piece_bytes:]
            self._exchange.send(piece.nbytes)
            super().send_all(piece)

    def receive_into(self, buffer: memoryview) -> int:
        count = super().receive_into(buffer[: self._line.down.piece_bytes])
        self._exchange.receive(count)
        return count


class Connection:
    """A connection that carries one exchange after the other.

    Args:
        url: of a request; the connection goes to its origin.
        tls: None: without TLS.
        timeout: seconds to wait for the connection.
        line: the simulated line; None: the real network.

    Attributes:
        socket: counts the bytes.
        used: whether a response has been received.
        closed: whether it can carry no further request.
    """

    def __init__(
        self, url: httpx.URL, tls: ssl.SSLContext | None, timeout: float, line: Line | None
    ) -> None:
        round_trips = 1 if tls is None else 2
        with contextlib.nullcontext() if line is None else line.opening(round_trips):
            inner = _connect(url, tls, timeout)
        self.socket = CountingSocket(inner) if line is None else SlowedSocket(inner, line)
        self.used = False
        self.closed = False

    def exchange(self, request: httpx.Request, patience: Patience, max_body: int) -> RawResponse:
        """Send a request and read its response, with a body of at most ``max_body`` bytes.

        Raises:
            BrokenResponse, OSError, TooLarge: as in `read_response`.
            InvalidField: a header of the request contains a line break.
        """
        self.socket.set_patience(patience)
        self.socket.begin_exchange()
        sent = self._send(request)
        response = read_response(self.socket, max_body, bodiless=request.method == "HEAD")
        self.used = True
        if not sent or not response.keeps_alive:
            self.close()
        return response

    def close(self) -> None:
        self.closed = True
        self.socket.close()

    def _send(self, request: httpx.Request) -> bool:
        """Send a request, and return whether all of it could be sent.

        A server may refuse a request before it has read all of it; its response can still be read.
        """
        head = _encode_head(request)
        try:
            for piece in cast(Iterable[bytes], request.stream):
                if head and len(piece) <= _SMALL_BYTES:
                    piece = head + piece
                elif head:
                    self.socket.send_all(head)
                head = b""
                self.socket.send_all(piece)
            self.socket.send_all(head)
        except BROKEN:
            return False
        return True


def _connect(url: httpx.URL, tls: ssl.SSLContext | None, timeout: float) -> socket.socket:
    plain = socket.create_connection((url.host, url.port or _PORTS[url.scheme]), timeout)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            if hasattr(socket, option):
                plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        return plain if tls is None else tls.wrap_socket(plain, server_hostname=url.host)
    except BaseException:
        plain.close()
        raise


def _encode_head(request: httpx.Request) -> bytes:
    """Encode the request line and the headers."""
    method, headers = request.method.encode("ascii"), request.headers.raw
    lines = [b"%s %s HTTP/1.1" % (method, request.url.raw_path)]
    lines += [b"%s: %s" % header for header in headers]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(headers) or head.count(b"\r") != len(headers):
        raise InvalidField("a request's header has to be one line", field="headers", limit=1)
    return head + b"\r\n\r\n"
