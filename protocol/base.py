"""The base class of JSON messages, and the field and limit in pydantic's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from protocol.errors import FieldValue

__all__ = ["Message", "extract_field", "extract_limit"]

_LIMIT_NAMES = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern", "expected")


class Message(BaseModel):
    """Base class of all JSON messages: immutable, without unknown fields, NaN or infinity.

    Its texts are Unicode: half of a surrogate pair, which JSON can spell, has no UTF-8 and could be
    neither stored nor shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and (text := _find_surrogate(raw)) is not None:
            raise ValueError(f"a text has half of a surrogate pair: {text!r}")
        return raw


def _find_surrogate(raw: dict[Any, Any]) -> str | None:
    """Return a text, among keys and values at any depth, that has no UTF-8."""
    rest: list[Any] = [raw]  # a list, because JSON may be nested more deeply than Python calls
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                return value[:40]
        elif isinstance(value, dict):
            rest.extend(value)
            rest.extend(value.values())
        elif isinstance(value, (list, tuple)):
            rest.extend(value)
    return None


def extract_field(error: Mapping[str, Any]) -> str:
    """Return the field in the context of a pydantic error, or ``"body"``.

    Args:
        error: one of pydantic's error dictionaries, for a whole message.
    """
    return str(error.get("ctx", {}).get("field", "body"))


def extract_limit(error: Mapping[str, Any]) -> FieldValue:
    """Return the limit in the context of a pydantic error; None: it has none.

    Args:
        error: one of pydantic's error dictionaries.
    """
    for name in _LIMIT_NAMES:
        if isinstance(limit := error.get("ctx", {}).get(name), (str, int, float)):
            return limit
    return None
