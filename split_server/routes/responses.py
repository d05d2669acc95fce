"""Answers as raw ASGI messages, for the routes that FastAPI does not see."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Sequence

from sqlalchemy.exc import OperationalError
from starlette.types import Send

from protocol.errors import Busy, InternalError, SFPromptError
from split_server.logs import request_id

Header = tuple[bytes, bytes]

_FULL_DISK_S = 10.0


def unexpected(error: Exception) -> SFPromptError:
    """What an asker is told of a failure that is no fault of the request."""
    if _is_full_disk(error):
        return Busy("the server's disk is full; try again later", retry_after_s=_FULL_DISK_S)
    return InternalError("the server failed on this request")


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OperationalError):
        return "disk is full" in str(error.orig)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def error_headers(error: SFPromptError) -> dict[str, str]:
    """What a refusal says in its headers: when to come back."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def error_body(error: SFPromptError) -> dict[str, object]:
    """A refusal as JSON, with the id of the request it refuses."""
    wire = error.to_wire()
    wire["error"]["request_id"] = request_id.get()
    return wire


async def send_error(send: Send, error: SFPromptError) -> None:
    """Answer with a typed error."""
    body = json.dumps(error_body(error)).encode()
    extra = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    await send_pieces(send, error.status, b"application/json", [body], extra)


async def send_pieces(
    send: Send,
    status: int,
    media: bytes,
    pieces: Sequence[bytes | memoryview],
    extra: Iterable[Header] = (),
) -> None:
    """Answer with a body in pieces that are written one after the other, never joined."""
    length = sum(memoryview(piece).nbytes for piece in pieces)
    headers = [
        (b"content-type", media),
        (b"content-length", b"%d" % length),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    # The last piece ends the answer: an empty message after it might have to wait, and the next
    # request would be counted with this one.
    last = len(pieces) - 1
    for place, piece in enumerate(pieces):
        await send({"type": "http.response.body", "body": piece, "more_body": place < last})
