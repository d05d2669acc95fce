"""One connection to one origin, kept alive from request to request."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, cast

import httptools
import httpx
import numpy as np

from edge_client.transport.link import Line
from protocol.errors import InvalidField, TooLarge

Buffer = bytes | bytearray | memoryview


class CountingSocket:
    """The little that HTTP needs of a socket, with a count of the bytes that pass."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self.sent = 0
        self.received = 0

    def begin_exchange(self) -> None:
        """Nothing: only a simulated link asks when a request begins."""

    def send_all(self, data: Buffer) -> None:
        """Send all of ``data``; the time-out is for each wait until a part of it has left."""
        rest = memoryview(data).cast("B")
        while rest.nbytes:
            count = self._inner.send(rest)
            self.sent += count
            rest = rest[count:]

    def receive_into(self, buffer: memoryview) -> int:
        """Some bytes into the buffer's beginning, and how many; 0: the other end has closed."""
        count = self._inner.recv_into(buffer)
        self.received += count
        return count

    def set_timeout(self, seconds: float) -> None:
        self._inner.settimeout(seconds)

    def close(self) -> None:
        self._inner.close()

    @property
    def silent(self) -> bool:
        """Whether nothing has come that nobody has read: not even the connection's end."""
        if isinstance(self._inner, ssl.SSLSocket) and self._inner.pending():
            return False  # it has been read already, by TLS
        poll = select.poll()
        poll.register(self._inner, select.POLLIN)
        return not poll.poll(0)


class SlowedSocket(CountingSocket):
    """The same at the end of a simulated line, in pieces that each wait for their turn."""

    def __init__(self, inner: socket.socket, line: Line) -> None:
        super().__init__(inner)
        self._line = line
        self._exchange = line.exchange()

    def begin_exchange(self) -> None:
        self._exchange = self._line.exchange()

    def send_all(self, data: Buffer) -> None:
        rest, most = memoryview(data).cast("B"), self._line.up.piece_bytes
        while rest.nbytes:
            piece, rest = rest[:most], rest[most:]
            self._exchange.send(piece.nbytes)
            super().send_all(piece)

    def receive_into(self, buffer: memoryview) -> int:
        count = super().receive_into(buffer[: self._line.down.piece_bytes])
        self._exchange.receive(count)
        return count


Body = bytearray | memoryview

Headers = list[tuple[bytes, bytes]]

_READ_BYTES = 16 * 1024  # at a time, through the parser

_HEAD_BYTES = 64 * 1024

_MOST_HEADERS = 100

_SWITCHING_PROTOCOLS = 101

# A length of over 64 bits is no HTTP to the parser, but it is a body that will not get smaller.
_OVERLONG = re.compile(rb"^content-length:[ \t]*([1-9][0-9]{19,999})[ \t]*\r$", re.I | re.M)


class BrokenAnswer(Exception):
    """What came is no answer, or not a whole one."""


@dataclass(frozen=True)
class RawResponse:
    """One answer.

    Attributes:
        body: one writable buffer.
        keeps_alive: whether another request may follow on its connection.
    """

    status: int
    headers: Headers
    body: Body
    keeps_alive: bool


def read_answer(socket: CountingSocket, most: int, *, bodiless: bool = False) -> RawResponse:
    """The next answer that comes through a socket.

    Args:
        socket: nothing of the answer has been read from it.
        most: bytes of its body.
        bodiless: it is to a HEAD request, and ends with its head.

    Raises:
        BrokenAnswer: this is no HTTP, or it breaks off.
        ConnectionError: the other end has closed the connection before it said anything.
        TooLarge: the body is over ``most`` bytes, or is said to be.
    """
    message = _Message()
    message.parser = httptools.HttpResponseParser(message)
    try:
        _read_head(socket, message, most)
        length = _length_of(message.headers)
        body: Body = bytearray()
        if bodiless:
            pass
        elif length is None:
            body = _read_on(socket, message, most)
        elif length > most:
            raise _too_large(most, length)
        elif message.whole:  # with 204 and 304 a length is that of another answer
            body = message.body
        else:
            body = _read_exactly(socket, length, message.body)
        followed = message.followed or (bodiless and bool(message.body))
        keeps_alive = message.keeps_alive and not followed
        return RawResponse(message.status, message.headers, body, keeps_alive)
    finally:
        message.parser = None  # they hold each other


class _Message:
    """What a parser has found so far; an answer that is only provisional (1xx) is forgotten.

    Nothing is raised here: the parser would wrap it.
    """

    def __init__(self) -> None:
        self.parser: httptools.HttpResponseParser | None = None
        self.status = 0
        self.keeps_alive = False
        self.headers: Headers = []
        self.body = bytearray()
        self.has_head = False
        self.whole = False
        self.followed = False  # by bytes that nobody has asked for

    def on_message_begin(self) -> None:
        self.followed = self.whole

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # else a trailer, or another answer's
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser is not None and not self.followed:
            self.status = self.parser.get_status_code()
            self.keeps_alive = self.parser.should_keep_alive()
            self.has_head = self.status >= 200 or self.status == _SWITCHING_PROTOCOLS

    def on_body(self, body: bytes) -> None:
        if self.has_head and not self.followed:
            self.body += body

    def on_message_complete(self) -> None:
        self.whole = self.has_head
        if not self.has_head:
            self.headers = []


def _read_head(socket: CountingSocket, message: _Message, most: int) -> None:
    taken, buffer = 0, memoryview(bytearray(_READ_BYTES))
    while not message.has_head:
        count = socket.receive_into(buffer)
        if not count:
            if not taken:
                raise ConnectionResetError("the server closed the connection without an answer")
            raise BrokenAnswer("the answer broke off in its head")
        taken += count
        try:
            _feed(message, buffer[:count])
        except BrokenAnswer:
            if (overlong := _OVERLONG.search(buffer[:count])) is not None:
                raise _too_large(most, int(overlong[1])) from None
            raise
        if len(message.headers) > _MOST_HEADERS or (taken > _HEAD_BYTES and not message.has_head):
            raise BrokenAnswer("the answer's head is too large")


def _feed(message: _Message, data: memoryview) -> None:
    try:
        if message.parser is not None:
            message.parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        if not message.whole:
            raise BrokenAnswer(f"no HTTP: {error}") from error
        message.followed = True


def _length_of(headers: Headers) -> int | None:
    """The length that the head names; the parser has refused what is no length."""
    for name, value in headers:
        if name.lower() == b"content-length":
            return int(value.strip().lstrip(b"0") or b"0")  # Python counts digits, zeros too
    return None


def _read_exactly(socket: CountingSocket, length: int, begun: bytearray) -> Body:
    body: memoryview = np.empty(length, np.uint8).data  # pages that nobody has to clear
    filled = len(begun)
    body[:filled] = begun
    while filled < length:
        count = socket.receive_into(body[filled:])
        if not count:
            raise BrokenAnswer(f"the answer broke off, {length - filled} more expected")
        filled += count
    return body


def _read_on(socket: CountingSocket, message: _Message, most: int) -> Body:
    """A body in chunks, or one that ends with its connection."""
    buffer, idle = memoryview(bytearray(_READ_BYTES)), 0
    while True:
        size = len(message.body)
        if size > most:
            raise _too_large(most, size)
        if message.whole:
            return message.body
        count = socket.receive_into(buffer)
        if not count:
            if any(name.lower() == b"transfer-encoding" for name, _ in message.headers):
                raise BrokenAnswer("the answer broke off between two chunks")
            return message.body
        _feed(message, buffer[:count])
        idle = 0 if len(message.body) > size else idle + count
        if idle > _HEAD_BYTES:
            raise BrokenAnswer("between the answer's chunks, or behind them, is too much")


def _too_large(most: int, value: int) -> TooLarge:
    return TooLarge("the server's answer is too large", field="body", limit=most, value=value)


BROKEN: Final = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)  # the other end is gone

_PORTS: Final = {"http": 80, "https": 443}

# A router between the two may forget a connection that is silent while the device computes.
_KEEP_ALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # s, s, times

_SMALL_BYTES = 4096  # of a piece that goes with the head, in one packet


class Connection:
    """One exchange after the other.

    Args:
        url: whose origin it goes to.
        tls: None: in the clear.
        timeout: seconds to wait for it.
        line: that it goes over, where one is simulated.

    Attributes:
        socket: counts what passes.
        used: whether an answer has come through it.
        closed: whether it takes no further request.
    """

    def __init__(
        self, url: httpx.URL, tls: ssl.SSLContext | None, timeout: float, line: Line | None
    ) -> None:
        round_trips = 1 if tls is None else 2
        with contextlib.nullcontext() if line is None else line.opening(round_trips):
            made = _connected(url, tls, timeout)
        self.socket = CountingSocket(made) if line is None else SlowedSocket(made, line)
        self.used = False
        self.closed = False

    def exchange(self, request: httpx.Request, timeout: float, most: int) -> RawResponse:
        """Send a request and read its answer, of a body of at most ``most`` bytes.

        Raises:
            BrokenAnswer, OSError, TooLarge: as `read_answer` does.
            InvalidField: a header of the request holds a line's end.
        """
        self.socket.set_timeout(timeout)
        self.socket.begin_exchange()
        sent = self._send(request)
        answer = read_answer(self.socket, most, bodiless=request.method == "HEAD")
        self.used = True
        if not sent or not answer.keeps_alive:
            self.close()
        return answer

    def close(self) -> None:
        self.closed = True
        self.socket.close()

    def _send(self, request: httpx.Request) -> bool:
        """Whether all of it could be sent.

        A server may refuse a request before it has read all of it: its answer is waiting then.
        """
        head = _head_of(request)
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


def _connected(url: httpx.URL, tls: ssl.SSLContext | None, timeout: float) -> socket.socket:
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


def _head_of(request: httpx.Request) -> bytes:
    """The request's line and headers."""
    method, headers = request.method.encode("ascii"), request.headers.raw
    lines = [b"%s %s HTTP/1.1" % (method, request.url.raw_path)]
    lines += [b"%s: %s" % header for header in headers]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(headers) or head.count(b"\r") != len(headers):
        raise InvalidField("a header of a request is one line", field="headers", limit=1)
    return head + b"\r\n\r\n"
