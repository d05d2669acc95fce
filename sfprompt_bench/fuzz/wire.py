"""HTTP over a bare socket, for requests that no HTTP client would send."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any, Final

_MAX_RESPONSE: Final = 64 * 1024 * 1024

_NO_BODY: Final = frozenset({204, 304})


class Closed(Exception):
    """The server has closed the connection before a response was complete."""


@dataclass(frozen=True)
class Response:
    """A response of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """The code of a typed error; None: it has none."""
        try:
            parsed: Any = json.loads(self.body)
            code = parsed["error"]["code"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return code if isinstance(code, str) else None


class RawConnection:
    """One connection to a server.

    Args:
        address: host and port.
        timeout_s: of every operation.
    """

    def __init__(self, address: tuple[str, int], timeout_s: float) -> None:
        self._socket = socket.create_connection(address, timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def end(self) -> None:
        """Send no more."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def send(self, data: bytes | bytearray) -> int:
        """Send until all is sent or the server has closed; returns the bytes that were sent.

        Raises:
            TimeoutError: the server reads no more.
        """
        view, sent = memoryview(data), 0
        while sent < len(view):
            try:
                sent += self._socket.send(view[sent:])
            except TimeoutError:
                raise
            except OSError:
                break
        return sent

    def response(self, *, to_head: bool = False) -> Response:
        """Read one response, after informational ones.

        Args:
            to_head: the request was HEAD, to which no body comes.

        Raises:
            Closed: the server closed the connection instead.
            TimeoutError: nothing came.
        """
        while True:
            head = self._until(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            status = int(first.split(" ", 2)[1])
            headers = {}
            for line in lines:
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            if status >= 200:
                break
        if to_head or status in _NO_BODY:
            return Response(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Response(status, headers, self._chunks())
        if "content-length" in headers:
            return Response(status, headers, self._exactly(int(headers["content-length"])))
        return Response(status, headers, self._rest())

    def is_closed(self) -> bool:
        """Wait until the server closes; returns False if it sends something.

        Raises:
            TimeoutError: it does neither.
        """
        try:
            return not self._receive()
        except Closed:
            return True

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            raise Closed from None
        if not data:
            raise Closed
        self._received += data
        if len(self._received) > _MAX_RESPONSE:
            raise Closed
        return data

    def _until(self, end: bytes) -> bytes:
        while end not in self._received:
            self._receive()
        part, _, self._received = self._received.partition(end)
        return part

    def _exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            self._receive()
        part, self._received = self._received[:count], self._received[count:]
        return part

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._until(b"\r\n").split(b";")[0], 16):
            body += self._exactly(size)
            self._exactly(2)
        self._until(b"\r\n")
        return body

    def _rest(self) -> bytes:
        try:
            while True:
                self._receive()
        except Closed:
            return self._exactly(len(self._received))
