"""Every way in which the two ends refuse each other, as one tree.

SFPromptError                     anything this project raises on purpose
├── InvalidRequest                the request itself is wrong; sending it again will not help
│   ├── MalformedFrame            the bytes are not a frame of this protocol
│   ├── TooLarge                  a declared or real size is over its limit
│   ├── UnsupportedVersion        the other end speaks another version of the protocol
│   ├── UnknownCodec              the frame names a codec that this end does not have
│   ├── InvalidField              one field has a value that is not allowed
│   ├── WrongShape                a tensor has another shape than the run asks for
│   ├── NonFinite                 a tensor holds NaN or infinity
│   └── EmptyUpdate               an update that says it was trained on no sample
├── Unauthorized                  no credential, or one that this server did not issue
├── Forbidden                     a good credential, used for what it does not allow
├── NotFound                      no such run, participant, state or page
├── Conflict                      right in itself, but not now
│   ├── StaleRound                the round that it speaks of is not open (any more)
│   ├── RunClosed                 the run is finished, cancelled or failed
│   ├── StepLost                  the server no longer holds that step; send its forward again
│   └── IdempotencyKeyReused      the key has been used for another request
├── Busy                          the server is full; come back after `retry_after_s`
├── InternalError                 the server failed; its log holds the request id
└── Unreachable                   no answer from the other end (raised by the client alone)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

__all__ = [
    "Busy",
    "Conflict",
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
    """Anything this project raises on purpose.

    Attributes:
        message: one sentence for a person.
        field: the field, setting or tensor that is wrong, if it is one.
        limit: what would have been allowed.
        value: what was there instead.
        hint: what to do next.
        retry_after_s: seconds after which to send the same request again; None: do not.
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
        """The error as it stands in a response: ``{"error": {...}}`` without empty fields.

        It is always JSON: NaN, infinity and huge integers become text, what is not Unicode is
        replaced, and long texts and lists are cut, so that a refusal never echoes a whole body.
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
    """The request itself is wrong; sending it again will not help."""

    code, status = "invalid_request", 400


class MalformedFrame(InvalidRequest):
    """The bytes are not a frame of this protocol."""

    code = "malformed_frame"


class TooLarge(InvalidRequest):
    """A declared or real size is over its limit."""

    code, status = "too_large", 413


class UnsupportedVersion(InvalidRequest):
    """The other end speaks another version of the protocol."""

    code, status = "unsupported_version", 426


class UnknownCodec(InvalidRequest):
    """The frame names a codec that this end does not have."""

    code, status = "unknown_codec", 415


class InvalidField(InvalidRequest):
    """One field has a value that is not allowed."""

    code, status = "invalid_field", 422


class WrongShape(InvalidRequest):
    """A tensor has another shape than the run asks for."""

    code, status = "wrong_shape", 422


class NonFinite(InvalidRequest):
    """A tensor holds NaN or infinity."""

    code, status = "non_finite", 422


class EmptyUpdate(InvalidRequest):
    """An update that says it was trained on no sample."""

    code, status = "empty_update", 422


class Unauthorized(SFPromptError):
    """No credential, or one that this server did not issue."""

    code, status = "unauthorized", 401


class Forbidden(SFPromptError):
    """A good credential, used for what it does not allow."""

    code, status = "forbidden", 403


class NotFound(SFPromptError):
    """No such run, participant, state or page."""

    code, status = "not_found", 404


class Conflict(SFPromptError):
    """Right in itself, but not now."""

    code, status = "conflict", 409


class StaleRound(Conflict):
    """The round that the request speaks of is not open (any more)."""

    code = "stale_round"


class RunClosed(Conflict):
    """The run is finished, cancelled or failed."""

    code = "run_closed"


class StepLost(Conflict):
    """The server no longer holds that step; send its forward again."""

    code = "step_lost"


class IdempotencyKeyReused(Conflict):
    """The key has been used for another request."""

    code = "idempotency_key_reused"


class Busy(SFPromptError):
    """The server is full; come back after ``retry_after_s``."""

    code, status = "busy", 503


class InternalError(SFPromptError):
    """The server failed; its log holds the request id."""

    code, status = "internal_error", 500


class Unreachable(SFPromptError):
    """No answer from the other end (raised by the client alone)."""

    code, status = "unreachable", 0


def _leaves_and_nodes(root: type[SFPromptError]) -> Iterator[type[SFPromptError]]:
    yield root
    for child in root.__subclasses__():
        yield from _leaves_and_nodes(child)


_BY_CODE: dict[str, type[SFPromptError]] = {
    error.code: error for error in _leaves_and_nodes(SFPromptError)
}

_MAX_CHARACTERS = 500  # of one text in an error

_MAX_ITEMS = 64  # of one list in an error

_MAX_RETRY_AFTER_S = 86_400.0


def error_from_wire(body: object, status: int) -> SFPromptError:
    """The typed error that a response stands for.

    A body that is none of ours (a proxy's page, say) becomes the node of the tree nearest to
    ``status``. Nothing in ``body`` is trusted: fields of a wrong type are left out.
    """
    wire = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(wire, Mapping):
        return _error_for_status(status)
    kind = _BY_CODE.get(str(wire.get("code")), type(_error_for_status(status)))
    return kind(
        _text(wire.get("message")) or "the server gave no reason",
        field=_text(wire.get("field")),
        limit=_field_value(wire.get("limit")),
        value=_field_value(wire.get("value")),
        hint=_text(wire.get("hint")),
        retry_after_s=_seconds(wire.get("retry_after_s")),
    )


def _error_for_status(status: int) -> SFPromptError:
    message = f"the server answered with status {status} and no typed error"
    nearest: dict[int, type[SFPromptError]] = {
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
    return nearest.get(status, fallback)(message)


def _json_safe(value: FieldValue) -> FieldValue:
    if isinstance(value, str):
        return _clipped(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):  # bool too
        return value if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
    if isinstance(value, list):
        return [_json_safe(item) for item in value[:_MAX_ITEMS]]
    return None if value is None else _clipped(repr(value))


def _clipped(text: str) -> str:
    return text[:_MAX_CHARACTERS].encode("utf-8", "replace").decode()


def _text(value: object) -> str | None:
    return _clipped(value) if isinstance(value, str) else None


def _field_value(value: object) -> FieldValue:
    if isinstance(value, list):
        return [_json_safe(item) for item in value[:_MAX_ITEMS] if _is_scalar(item)]
    return _json_safe(value) if isinstance(value, (str, int, float)) else None


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _seconds(value: object) -> float | None:
    """Seconds to wait, from 0 to a day; None for what is no such number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(min(value, _MAX_RETRY_AFTER_S)) if value >= 0 else None
