"""Errors for responses that no server of this protocol sends: an HTTP proxy's, for example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from protocol.errors import (
    Busy,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    SFPromptError,
    TooLarge,
    Unauthorized,
)

__all__ = ["STATUS_FIELD", "describe_request", "is_typed", "untyped_error"]

STATUS_FIELD: Final = "status"  # the field of every error that `untyped_error` makes

_MIB = 1024 * 1024

_HINTS: Final = {
    401: "does the HTTP proxy ask for a password of its own?",
    403: "does the HTTP proxy allow this address and this path?",
    404: "does the address have the right port and path? which program answers there?",
    413: "raise the HTTP proxy's limit of request bodies (nginx: client_max_body_size), "
    "see docs/hosting.md",
    502: "is the server running, and does the HTTP proxy have its right address and port?",
    503: "is the server running, and does the HTTP proxy have its right address and port?",
    504: "raise the HTTP proxy's time-out (nginx: proxy_read_timeout) above that of a request, "
    "see docs/hosting.md",
}

_TYPES: Final[Mapping[int, type[SFPromptError]]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    408: Busy,
    413: TooLarge,
    429: Busy,
    502: Busy,
    503: Busy,
    504: Busy,
    **dict.fromkeys(range(520, 531), Busy),  # of a content delivery network: as 502 or 504
}


def is_typed(body: object) -> bool:
    """Whether a response's JSON body has the form of this protocol's errors."""
    return isinstance(body, Mapping) and isinstance(body.get("error"), Mapping)


def describe_request(method: str, path: str, nbytes: int) -> str:
    """Return a request's method, path and size for people.

    Args:
        method: of the request.
        path: without the query.
        nbytes: size of the request's body.
    """
    if not nbytes:
        return f"{method} {path}"
    size = f"{nbytes / _MIB:.1f} MiB" if nbytes >= _MIB else f"{nbytes} bytes"
    return f"{method} {path} with {size}"


def untyped_error(status: int, request: str, nbytes: int) -> SFPromptError:
    """Build the error of a response without a typed error.

    Args:
        status: the HTTP status.
        request: as `describe_request` describes it.
        nbytes: size of the request's body.
    """
    fallback = InvalidRequest if 400 <= status < 500 else InternalError
    hint = _HINTS.get(504 if status in (408, 524) else status)
    return _TYPES.get(status, fallback)(
        f"{request} was answered with status {status}, probably by an HTTP proxy between here and "
        "the server: the server's own errors have a code",
        field=STATUS_FIELD,
        value=nbytes if status == 413 else status,
        hint=hint or "which program answers at this address?",
    )
