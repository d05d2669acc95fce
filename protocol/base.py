"""The base class of JSON messages, and the field and limit in pydantic's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from protocol.errors import FieldValue

__all__ = ["Message", "extract_field", "extract_limit"]

_LIMIT_NAMES = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern", "expected")


class Message(BaseModel):
    """Base class of all JSON messages: immutable, without unknown fields, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
