"""A socket that counts what passes through it; with a link, at that link's pace."""

from __future__ import annotations

import select
import socket
import ssl

from edge_client.transport.link import Line

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
