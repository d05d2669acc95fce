"""Suggest the field that was meant, where a message has an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

__all__ = ["nearest_field", "nearest_name"]

_CUTOFF = 0.7  # of difflib's ratio: one letter in three may be wrong


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like ``name``; None: none is like it."""
    close = difflib.get_close_matches(name.lower(), list(names), 1, _CUTOFF)
    return close[0] if close else None


def nearest_field(message_type: type[BaseModel], path: Sequence[object], raw: object) -> str | None:
    """Return the dotted path of the field that was probably meant; None: there is none.

    Args:
        message_type: of the whole message.
        path: of the unknown field in it.
        raw: the message. A table that is one of several has a class method ``class_of``.
    """
    *tables, last = (str(part) for part in path)
    here = message_type
    for table in tables:
        raw = raw.get(table) if isinstance(raw, dict) else None
        inner = type(raw) if isinstance(raw, BaseModel) else _table(here, table)
        if inner is None:
            return None
        here = inner
        if isinstance(raw, dict) and hasattr(here, "class_of"):
            here = here.class_of(raw)
    if (close := nearest_name(last, here.model_fields)) is not None:
        return ".".join([*tables, close])
    elsewhere = {name: place for place, name in _nested(message_type)}
    close = nearest_name(last, elsewhere)
    return f"{elsewhere[close]}.{close}" if close is not None else None


def _table(parent: type[BaseModel], name: str) -> type[BaseModel] | None:
    if name not in parent.model_fields:
        return None
    return next(_models_in(parent.model_fields[name].annotation), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _nested(message_type: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield each field of the message's tables, with its table's name."""
    for place, info in message_type.model_fields.items():
        for table in _models_in(info.annotation):
            yield from ((place, name) for name in table.model_fields)
