"""One connection to one origin, kept alive from request to request."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterable
from typing import Final, cast

import httpx

from edge_client.transport.answer import Answer, read_answer
from edge_client.transport.link import Line
from edge_client.transport.sockets import CountingSocket, SlowedSocket
from protocol.errors import InvalidField

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

    def exchange(self, request: httpx.Request, timeout: float, most: int) -> Answer:
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
