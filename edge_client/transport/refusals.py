"""Make the typed error of a response that is none of success, and of a request without one."""

from __future__ import annotations

import json
import math
import ssl

import httpx

from edge_client.transport.response import Body
from protocol.errors import InvalidField, SFPromptError, Unreachable, error_from_wire
from protocol.untyped import describe_request, is_typed, untyped_error

_MAX_RETRY_AFTER_S = 86_400.0


def refusal_of(response: httpx.Response, body: Body, request: httpx.Request) -> SFPromptError:
    """Return the error of a response, the server's or an HTTP proxy's."""
    if response.is_redirect:
        return InvalidField(
            "the server redirects to another address",
            field="url",
            value=response.headers["location"],
            hint="use that address",
        )
    try:
        wire = json.loads(bytes(body))
    except (ValueError, RecursionError):
        wire = None
    if is_typed(wire):
        error = error_from_wire(wire, response.status_code)
    else:
        nbytes = int(request.headers.get("content-length", "0"))
        described = describe_request(request.method, request.url.path, nbytes)
        error = untyped_error(response.status_code, described, nbytes)
    if error.retry_after_s is None:
        error.retry_after_s = _parse_seconds(response.headers.get("retry-after", ""))
    return error


def unreachable(
    request: httpx.Request, base: httpx.URL, error: httpx.TransportError
) -> Unreachable:
    """Return the error of a request that got no response, with its cause.

    The cause is TLS's own error if there is one: a refused certificate stays refused.
    """
    refused = _tls_refusal(error)
    cause = refused or error
    if isinstance(refused, ssl.SSLCertVerificationError):
        made = Unreachable(
            f"the server's certificate is not trusted: {refused.verify_message}",
            field="url",
            value=str(base),
            hint="give the server's certificate with --ca-file, and use a name that it is made for",
        )
    elif refused is not None and "WRONG_VERSION_NUMBER" in str(refused):
        made = Unreachable(
            "the server does not speak TLS at this address",
            field="url",
            value=str(base),
            hint="use http:// instead of https://, or start the server with --tls-cert",
        )
    else:
        made = Unreachable(
            f"{request.method} {request.url.path}: {error}",
            field="url",
            value=str(base),
            hint="is the server running, and can this device reach it?",
        )
    made.__cause__ = cause
    return made


def _parse_seconds(text: str) -> float | None:
    """Parse a Retry-After header; None unless it gives seconds."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(seconds, _MAX_RETRY_AFTER_S) if seconds >= 0 and not math.isnan(seconds) else None


def _tls_refusal(error: BaseException) -> ssl.SSLError | None:
    cause = error.__cause__
    return cause if isinstance(cause, ssl.SSLError) else None
