"""Read one HTTP/1.1 response from a socket into one buffer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import httptools

from protocol.errors import TooLarge

Body = bytearray | memoryview

Headers = list[tuple[bytes, bytes]]

_READ_BYTES = 16 * 1024  # at a time, through the parser

_MAX_HEAD_BYTES = 64 * 1024

_MAX_HEADERS = 100

_SWITCHING_PROTOCOLS = 101

# The parser rejects a length of over 64 bits as no HTTP; it is reported as too large instead.
_OVERLONG = re.compile(rb"^content-length:[ \t]*([1-9][0-9]{19,999})[ \t]*\r$", re.I | re.M)


class BrokenResponse(Exception):
    """The received bytes are not a complete HTTP response."""


class Receiver(Protocol):
    """The receiving side of a socket."""

    def receive_into(self, buffer: memoryview) -> int:
        """Receive some bytes into the buffer and return their number; 0: the peer has closed."""


@dataclass(frozen=True)
class RawResponse:
    """One response.

    Attributes:
        body: one writable buffer.
        keeps_alive: whether the connection can carry another request.
    """

    status: int
    headers: Headers
    body: Body
    keeps_alive: bool


def read_response(socket: Receiver, max_body: int, *, bodiless: bool = False) -> RawResponse:
    """Read the next response from a socket.

    Args:
        socket: nothing of the response has been read from it.
        max_body: bytes of the body, at most.
        bodiless: the request is HEAD, so the response ends with its headers.

    Raises:
        BrokenResponse: the bytes are not HTTP, or end early.
        ConnectionError: the server closed the connection before it sent a byte.
        TooLarge: the body, or its announced length, is over ``max_body``.
    """
    message = _Message()
    message.parser = httptools.HttpResponseParser(message)
    try:
        _read_head(socket, message, max_body)
        length = _content_length(message.headers)
        body: Body = bytearray()
        if bodiless:
            pass
        elif length is None:
            body = _read_until_end(socket, message, max_body)
        elif length > max_body:
            raise _too_large(max_body, length)
        elif message.complete:  # with 204 and 304 the length is that of another response
            body = message.body
        else:
            body = _read_exactly(socket, length, message.body)
        surplus = message.surplus or (bodiless and bool(message.body))
        keeps_alive = message.keeps_alive and not surplus
        return RawResponse(message.status, message.headers, body, keeps_alive)
    finally:
        message.parser = None  # parser and message refer to each other


class _Message:
    """What the parser has read so far; a provisional response (1xx) is dropped.

    The callbacks raise nothing, because the parser would wrap it.
    """

    def __init__(self) -> None:
        self.parser: httptools.HttpResponseParser | None = None
        self.status = 0
        self.keeps_alive = False
        self.headers: Headers = []
        self.body = bytearray()
        self.has_head = False
        self.complete = False
        self.surplus = False  # bytes follow that belong to no request

    def on_message_begin(self) -> None:
        self.surplus = self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # else a trailer, or a header of surplus bytes
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser is not None and not self.surplus:
            self.status = self.parser.get_status_code()
            self.keeps_alive = self.parser.should_keep_alive()
            self.has_head = self.status >= 200 or self.status == _SWITCHING_PROTOCOLS

    def on_body(self, body: bytes) -> None:
        if self.has_head and not self.surplus:
            self.body += body

    def on_message_complete(self) -> None:
        self.complete = self.has_head
        if not self.has_head:
            self.headers = []


def _read_head(socket: Receiver, message: _Message, max_body: int) -> None:
    received, buffer = 0, memoryview(bytearray(_READ_BYTES))
    while not message.has_head:
        count = socket.receive_into(buffer)
        if not count:
            if not received:
                raise ConnectionResetError("the server closed the connection without a response")
            raise BrokenResponse("the response ended within its headers")
        received += count
        try:
            _feed(message, buffer[:count])
        except BrokenResponse:
            if (overlong := _OVERLONG.search(buffer[:count])) is not None:
                raise _too_large(max_body, int(overlong[1])) from None
            raise
        too_long = received > _MAX_HEAD_BYTES and not message.has_head
        if len(message.headers) > _MAX_HEADERS or too_long:
            raise BrokenResponse("the response's headers are too large")


def _feed(message: _Message, data: memoryview) -> None:
    try:
        if message.parser is not None:
            message.parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        if not message.complete:
            raise BrokenResponse(f"the response is not HTTP: {error}") from error
        message.surplus = True


def _content_length(headers: Headers) -> int | None:
    """Return the announced length; the parser has already rejected invalid ones."""
    for name, value in headers:
        if name.lower() == b"content-length":
            return int(value.strip().lstrip(b"0") or b"0")  # int() limits digits, zeros included
    return None


def _read_exactly(socket: Receiver, length: int, start: bytearray) -> Body:
    """Read a body of known length, of which ``start`` has been received."""
    import numpy as np  # here, because it takes longer to import than a first request

    body: memoryview = np.empty(length, np.uint8).data  # unlike bytearray, not zeroed first
    filled = len(start)
    body[:filled] = start
    while filled < length:
        count = socket.receive_into(body[filled:])
        if not count:
            raise BrokenResponse(f"the response ended early, {length - filled} bytes are missing")
        filled += count
    return body


def _read_until_end(socket: Receiver, message: _Message, max_body: int) -> Body:
    """Read a body in chunks, or one that ends when the server closes the connection."""
    buffer, idle = memoryview(bytearray(_READ_BYTES)), 0
    while True:
        size = len(message.body)
        if size > max_body:
            raise _too_large(max_body, size)
        if message.complete:
            return message.body
        count = socket.receive_into(buffer)
        if not count:
            if any(name.lower() == b"transfer-encoding" for name, _ in message.headers):
                raise BrokenResponse("the response ended between two chunks")
            return message.body
        _feed(message, buffer[:count])
        idle = 0 if len(message.body) > size else idle + count
        if idle > _MAX_HEAD_BYTES:
            raise BrokenResponse("the response has too many bytes between or after its chunks")


def _too_large(max_body: int, value: int) -> TooLarge:
    return TooLarge("the server's response is too large", field="body", limit=max_body, value=value)
