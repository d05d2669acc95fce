"""All errors of the protocol, as one tree.

SFPromptError                     base class of all errors of this project
├── InvalidRequest                the request is wrong; a repetition fails too
│   ├── MalformedFrame            the bytes are not a frame of this protocol
│   ├── TooLarge                  a declared or real size is over its limit
│   ├── UnsupportedVersion        the other end uses another version of the protocol
│   ├── UnknownCodec              this end does not have the codec that the frame names
│   ├── InvalidField              the value of one field is not allowed
│   ├── WrongShape                the shape of a tensor is not what the run requires
│   ├── NonFinite                 a tensor contains NaN or infinity
│   └── EmptyUpdate               the update was trained on no samples
├── DamagedFrame                  bytes of the frame changed on their way; send it again
├── Unauthorized                  the credential is missing, or this server did not issue it
├── Forbidden                     the credential is valid, but does not allow this request
│   └── Removed                   the operator removed this participant from its run
├── NotFound                      no such run, participant, state or page
├── Conflict                      the request is valid, but not in the current state
│   ├── StaleRound                the round of the request is not open
│   ├── RunClosed                 the run is finished, cancelled or failed
│   ├── StepLost                  the server no longer has the step; send its forward again
│   └── IdempotencyKeyReused      the idempotency key was used for another request
├── Busy                          the server is full; repeat after `retry_after_s`
├── InternalError                 the server failed; its log has the request id
│   └── DamagedFile               a stored file is not what was written; the log names it
├── RefusedByDevice               the device's policy forbids it (raised only by a client)
└── Unreachable                   no response from the other end (raised only by a client)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

from protocol.printable import printable

__all__ = [
    "Busy",
    "Conflict",
    "DamagedFile",
    "DamagedFrame",
    "EmptyUpdate",
    "FieldValue",
    "Forbidden",
    "IdempotencyKeyReused",
    "InternalError",
    "InvalidField",
    "InvalidRequest",
    "MalformedFrame",
    "NonFinite",
    "NotFound",
    "RefusedByDevice",
    "Removed",
    "RunClosed",
    "SFPromptError",
    "StaleRound",
    "StepLost",
    "TooLarge",
    "Unauthorized",
    "UnknownCodec",
    "Unreachable",
    "UnsupportedVersion",
    "WrongShape",
    "error_from_wire",
]

FieldValue: TypeAlias = str | int | float | bool | list[Any] | None


class SFPromptError(Exception):
    """Base class of all errors of this project.

    Attributes:
        message: one sentence for people.
        field: name of the wrong field, setting or tensor, if there is one.
        limit: the allowed value or values.
        value: the refused value.
        hint: what to do next.
        retry_after_s: seconds until the same request may be repeated; None: do not repeat it.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        limit: FieldValue = None,
        value: FieldValue = None,
        hint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.limit = limit
        self.value = value
        self.hint = hint
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        parts = [self.message]
        if self.field is not None:
            parts.append(f"field: {self.field}")
        if self.limit is not None:
            parts.append(f"allowed: {self.limit}")
        if self.value is not None:
            parts.append(f"found: {self.value}")
        if self.hint is not None:
            parts.append(self.hint)
        return "; ".join(parts)

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON body of a response: ``{"error": {...}}`` without empty fields.

        The result is always valid JSON: NaN, infinity and huge integers become text, and invalid
        Unicode is replaced. Long texts and lists are truncated, so that an error never echoes a
        whole request body.
        """
        fields = {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "limit": self.limit,
            "value": self.value,
            "hint": self.hint,
            "retry_after_s": self.retry_after_s,
        }
        return {
            "error": {
                name: _json_safe(value) for name, value in fields.items() if value is not None
            }
        }


class InvalidRequest(SFPromptError):
    """The request is wrong; a repetition fails too."""

    code, status = "invalid_request", 400


class MalformedFrame(InvalidRequest):
    """The bytes are not a frame of this protocol."""

    code = "malformed_frame"


class TooLarge(InvalidRequest):
    """A declared or real size is over its limit."""

    code, status = "too_large", 413


class UnsupportedVersion(InvalidRequest):
    """The other end uses another version of the protocol."""

    code, status = "unsupported_version", 426


class UnknownCodec(InvalidRequest):
    """This end does not have the codec that the frame names."""

    code, status = "unknown_codec", 415


class InvalidField(InvalidRequest):
    """The value of one field is not allowed."""

    code, status = "invalid_field", 422


class WrongShape(InvalidRequest):
    """The shape of a tensor is not what the run requires."""

    code, status = "wrong_shape", 422


class NonFinite(InvalidRequest):
    """A tensor contains NaN or infinity."""

    code, status = "non_finite", 422


class EmptyUpdate(InvalidRequest):
    """The update was trained on no samples."""

    code, status = "empty_update", 422


class DamagedFrame(SFPromptError):
    """Bytes of the frame changed on their way; send it again."""

    code, status = "damaged_frame", 400


class Unauthorized(SFPromptError):
    """The credential is missing, or this server did not issue it."""

    code, status = "unauthorized", 401


class Forbidden(SFPromptError):
    """The credential is valid, but does not allow this request."""

    code, status = "forbidden", 403


class Removed(Forbidden):
    """The operator removed this participant from its run."""

    code = "removed"


class NotFound(SFPromptError):
    """No such run, participant, state or page."""

    code, status = "not_found", 404


class Conflict(SFPromptError):
    """The request is valid, but not in the current state."""

    code, status = "conflict", 409


class StaleRound(Conflict):
    """The round of the request is not open."""

    code = "stale_round"


class RunClosed(Conflict):
    """The run is finished, cancelled or failed."""

    code = "run_closed"


class StepLost(Conflict):
    """The server no longer has the step; send its forward again."""

    code = "step_lost"


class IdempotencyKeyReused(Conflict):
    """The idempotency key was used for another request."""

    code = "idempotency_key_reused"


class Busy(SFPromptError):
    """The server is full; repeat after ``retry_after_s``."""

    code, status = "busy", 503


class InternalError(SFPromptError):
    """The server failed; its log has the request id."""

    code, status = "internal_error", 500


class DamagedFile(InternalError):
    """A stored file is not what was written; the log names it."""

    code = "damaged_file"


class RefusedByDevice(SFPromptError):
    """The device's policy forbids what the server asks (raised only by a client)."""

    code, status = "refused_by_device", 0


class Unreachable(SFPromptError):
    """No response from the other end (raised only by a client)."""

    code, status = "unreachable", 0


def _walk_tree(root: type[SFPromptError]) -> Iterator[type[SFPromptError]]:
    yield root
    for child in root.__subclasses__():
        yield from _walk_tree(child)


_BY_CODE: dict[str, type[SFPromptError]] = {
    error.code: error for error in _walk_tree(SFPromptError)
}

_MAX_CHARACTERS = 500  # characters of one text in an error

_MAX_ITEMS = 64  # items of one list in an error

_MAX_RETRY_AFTER_S = 86_400.0


def error_from_wire(body: object, status: int) -> SFPromptError:
    """Build the typed error of a response.

    If the body has another form, such as the HTML page of a gateway, ``status`` decides the class.
    Fields of a wrong type are dropped, because the body is not trusted.

    Args:
        body: decoded JSON body of the response, or any other object.
        status: HTTP status of the response.
    """
    wire = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(wire, Mapping):
        return _error_for_status(status)
    error_type = _BY_CODE.get(str(wire.get("code")), type(_error_for_status(status)))
    return error_type(
        _text(wire.get("message")) or "the server gave no reason",
        field=_text(wire.get("field")),
        limit=_field_value(wire.get("limit")),
        value=_field_value(wire.get("value")),
        hint=_text(wire.get("hint")),
        retry_after_s=_seconds(wire.get("retry_after_s")),
    )


def _error_for_status(status: int) -> SFPromptError:
    message = f"the server responded with status {status} and no typed error"
    by_status: dict[int, type[SFPromptError]] = {
        401: Unauthorized,
        403: Forbidden,
        404: NotFound,
        408: Busy,
        409: Conflict,
        413: TooLarge,
        429: Busy,
        502: Busy,
        503: Busy,
        504: Busy,
    }
    fallback = InvalidRequest if 400 <= status < 500 else InternalError
    return by_status.get(status, fallback)(message)


def _json_safe(value: FieldValue) -> FieldValue:
    if isinstance(value, str):
        return _truncate(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):  # includes bool
        return value if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
    if isinstance(value, list):
        return [_json_safe(item) for item in value[:_MAX_ITEMS]]
    return None if value is None else _truncate(repr(value))


def _truncate(text: str) -> str:
    return text[:_MAX_CHARACTERS].encode("utf-8", "replace").decode()


def _text(value: object) -> str | None:
    return printable(_truncate(value)) if isinstance(value, str) else None


def _field_value(value: object) -> FieldValue:
    if isinstance(value, list):
        return [_field_value(item) for item in value[:_MAX_ITEMS] if _is_scalar(item)]
    if isinstance(value, str):
        return _text(value)
    return _json_safe(value) if isinstance(value, (int, float)) else None


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _seconds(value: object) -> float | None:
    """Return the seconds to wait, at most a day; None: ``value`` is not a number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(min(value, _MAX_RETRY_AFTER_S)) if value >= 0 else None
