"""Convert every exception to a response with a typed error of the protocol."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.types import Send

from protocol.base import extract_field, extract_limit
from protocol.errors import (
    Busy,
    InternalError,
    InvalidField,
    InvalidRequest,
    NotFound,
    SFPromptError,
)
from split_server.runtime.process import request_id

Header = tuple[bytes, bytes]

_FULL_DISK_S = 10.0


def unexpected(error: Exception) -> SFPromptError:
    """Create the typed error for a failure that the request did not cause."""
    if _is_full_disk(error):
        return Busy("the server's disk is full; try again later", retry_after_s=_FULL_DISK_S)
    return InternalError("the server failed on this request")


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk is the cause, however deep; safetensors only names it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error.orig if isinstance(error, OperationalError) else error)
        if any(sign in text for sign in ("disk is full", "No space left on device")):
            return True
        error = error.__cause__ or error.__context__
    return False


def error_headers(error: SFPromptError) -> dict[str, str]:
    """Return the headers of an error response: ``retry-after`` if there is one."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def error_body(error: SFPromptError) -> dict[str, object]:
    """Return an error as a JSON object, with the id of the request."""
    wire = error.to_wire()
    wire["error"]["request_id"] = request_id.get()
    return wire


async def send_error(send: Send, error: SFPromptError) -> None:
    """Send a typed error."""
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
    """Send a response whose body is in pieces, without joining them.

    Args:
        send: ASGI function that sends messages.
        status: HTTP status.
        media: content type.
        pieces: the body, at least one piece.
        extra: further headers.
    """
    length = sum(memoryview(piece).nbytes for piece in pieces)
    headers = [
        (b"content-type", media),
        (b"content-length", b"%d" % length),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    # The last piece ends the response. A separate empty message might have to wait, and bytes of
    # the next request would be counted for this one.
    last = len(pieces) - 1
    for index, piece in enumerate(pieces):
        await send({"type": "http.response.body", "body": piece, "more_body": index < last})


class Refused(HTTPException):
    """Wraps a typed error, because FastAPI's body parsing replaces all but `HTTPException`."""

    def __init__(self, refusal: SFPromptError) -> None:
        super().__init__(refusal.status, refusal.message)
        self.refusal = refusal


def add_error_handlers(app: FastAPI) -> None:
    """Register the error handlers of an app; `RequestMiddleware` logs unexpected exceptions."""
    app.add_exception_handler(SFPromptError, _typed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _typed(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, SFPromptError):
        raise error
    return JSONResponse(error_body(error), error.status, error_headers(error))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    if first["type"] == "json_invalid":  # the location is a byte offset, not a field
        return await _typed(request, _no_json(f"{first['ctx']['error']}, at {first['loc'][-1]}"))
    value = first.get("input")
    plain = value if isinstance(value, (str, int, float, bool)) else None
    location = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    refusal = InvalidField(
        first["msg"],
        field=".".join(location) or extract_field(first),
        limit=extract_limit(first),
        value=plain[:200] if isinstance(plain, str) else plain,
    )
    return await _typed(request, refusal)


async def _http(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error, Refused):
        return await _typed(request, error.refusal)
    if error.status_code == 400:  # FastAPI: invalid UTF-8 or too deep nesting
        return await _typed(request, _no_json("it cannot be decoded"))
    refusal = _not_routed(request, error)
    return JSONResponse(error_body(refusal), error.status_code, error.headers)


def _no_json(reason: str) -> InvalidField:
    return InvalidField(f"the body is not JSON: {reason}", field="body", limit="JSON in UTF-8")


def _not_routed(request: Request, error: HTTPException) -> SFPromptError:
    if error.status_code == 405:
        message = "this path does not accept this method"
        return InvalidRequest(message, field="method", value=request.method)
    kind = NotFound if error.status_code == 404 else InvalidRequest
    return kind(str(error.detail), field="path", value=request.url.path)


async def _unexpected(_request: Request, error: Exception) -> JSONResponse:
    refusal = unexpected(error)
    return JSONResponse(error_body(refusal), refusal.status, error_headers(refusal))
