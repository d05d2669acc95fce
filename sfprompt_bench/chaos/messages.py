"""HTTP/1.1 messages as bytes, read whole from a connection."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_MAX_HEAD = 256 * 1024

_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,12})[ \t]*\r?$", re.I | re.M)

# A path's parts behind the run's id, or behind ``/v1/split``, name the route.
_RUN = re.compile(r"/v1/runs/[^/]+/?(.*)")

_SPLIT = "/v1/split/"


@dataclass(frozen=True)
class HTTPMessage:
    """A request or a response.

    Attributes:
        head: first line and headers, with the empty line.
        body: all of it.
    """

    head: bytes
    body: bytes

    @property
    def data(self) -> bytes:
        return self.head + self.body

    @property
    def status(self) -> int:
        """The status of a response; 0: it is damaged."""
        parts = self.head.split(b" ", 2)
        return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0

    @property
    def target(self) -> str:
        """Method and path of a request, with its query."""
        return b" ".join(self.head.split(b"\r\n", 1)[0].split(b" ")[:2]).decode("latin-1")

    @property
    def route(self) -> str:
        """The name of a request's route, for example ``update`` or ``exchange``."""
        path = urlsplit(self.target.partition(" ")[2]).path
        if path.startswith(_SPLIT):
            return path.removeprefix(_SPLIT)
        match = _RUN.fullmatch(path)
        if match is None:
            return path.rpartition("/")[2] or "/"
        return match[1].rpartition("/")[2] or "run"


async def read_message(reader: asyncio.StreamReader) -> HTTPMessage | None:
    """Read the next message; None: the connection has ended, also in the middle of one."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        match = _LENGTH.search(head)
        body = await reader.readexactly(int(match[1])) if match else b""
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return None
    return HTTPMessage(head, body)


def damaged(data: bytes, share: float, draw: int) -> bytes:
    """Return the bytes with one to eight bits flipped, at a share of their length."""
    at = min(int(share * len(data)), len(data) - 1)
    changed = bytearray(data)
    changed[at] ^= draw % 255 + 1
    return bytes(changed)
