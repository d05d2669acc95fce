"""Reads one HTTP answer: its head through a parser, its body past it, straight into one buffer."""

from __future__ import annotations

import re
from dataclasses import dataclass

import httptools
import numpy as np

from edge_client.transport.sockets import CountingSocket
from protocol.errors import TooLarge

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
class Answer:
    """One answer.

    Attributes:
        body: one writable buffer.
        keeps_alive: whether another request may follow on its connection.
    """

    status: int
    headers: Headers
    body: Body
    keeps_alive: bool


def read_answer(socket: CountingSocket, most: int, *, bodiless: bool = False) -> Answer:
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
        return Answer(message.status, message.headers, body, keeps_alive)
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
