"""The header of a frame: msgpack restricted to a closed set of types.

Allowed are text, 64-bit integers, finite floating-point numbers, booleans, nil, lists, and maps
with text keys. Binary, extension types and time-stamps are refused: no header can name code.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack

from protocol.errors import FieldValue, MalformedFrame, TooLarge
from protocol.limits import FrameLimits

__all__ = ["check_text", "pack_header", "unpack_header"]

_KEYS = {"kind", "meta", "tensors"}

_SPEC_KEYS = 4  # keys of the map that describes one tensor


def pack_header(kind: str, meta: dict[str, Any], tensors: list[dict[str, Any]]) -> bytes:
    """Pack a header, with its keys in this order and every number in its shortest form.

    Raises:
        MalformedFrame: msgpack cannot represent a value.
    """
    try:
        packed: bytes = msgpack.packb({"kind": kind, "meta": meta, "tensors": tensors})
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedFrame(f"the header cannot be packed ({error})", field="header") from error
    return packed


def unpack_header(
    packed: memoryview | bytes, limits: FrameLimits
) -> tuple[str, dict[str, Any], list[Any]]:
    """Unpack a header into the kind, the meta part and the raw descriptions of the tensors.

    Kind and meta are checked completely. The descriptions are a list of bounded length, whose items
    are not checked.

    Raises:
        MalformedFrame: the bytes are not msgpack, a type is not allowed, or a key is missing or
            unknown.
        TooLarge: a text, a list, a map or the nesting is over its limit.
    """
    # msgpack allocates memory for the declared length of a list, hence the bound.
    max_items = max(limits.max_items, limits.max_tensors, _SPEC_KEYS)
    try:
        header = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_map_of_pairs,
            ext_hook=_refuse_extension,
            max_ext_len=0,
            max_bin_len=0,
            max_array_len=max_items,
            max_map_len=max_items,
        )
    except (msgpack.StackError, RecursionError) as error:
        raise _too_deep("header", limits, "more than msgpack can read") from error
    except (ValueError, msgpack.UnpackException) as error:
        if "exceeds max_array_len" in str(error) or "exceeds max_map_len" in str(error):
            raise TooLarge(
                "a list or map in the header is too long",
                field="header",
                limit=max_items,
                value=str(error),
            ) from error
        reason = str(error) or type(error).__name__
        raise MalformedFrame(
            f"the header is not msgpack of the allowed types ({reason})", field="header"
        ) from error
    if not isinstance(header, dict) or set(header) != _KEYS:
        raise _not_a_header(header)
    kind, meta, tensors = header["kind"], header["meta"], header["tensors"]
    if not isinstance(kind, str) or not isinstance(meta, dict) or not isinstance(tensors, list):
        raise _not_a_header(header)
    check_text(kind, "kind", limits)
    _check_value(meta, "meta", limits, depth=1)
    if len(tensors) > limits.max_tensors:
        raise TooLarge(
            "the frame has too many tensors",
            field="tensors",
            limit=limits.max_tensors,
            value=len(tensors),
        )
    return kind, meta, tensors


def check_text(text: str, where: str, limits: FrameLimits) -> None:
    """Refuse a text with more UTF-8 bytes than `FrameLimits.max_text`.

    Raises:
        TooLarge: the text is longer.
    """
    length = len(text.encode())
    if length > limits.max_text:
        raise TooLarge(
            "a text in the header is too long", field=where, limit=limits.max_text, value=length
        )


def _not_a_header(header: object) -> MalformedFrame:
    return MalformedFrame(
        "a header must be a map of exactly kind (text), meta (map) and tensors (list)",
        field="header",
        limit=sorted(_KEYS),
        value=sorted(header) if isinstance(header, dict) else type(header).__name__,
    )


def _too_deep(where: str, limits: FrameLimits, depth: FieldValue) -> TooLarge:
    return TooLarge(
        "lists and maps are nested too deeply",
        field=where,
        limit=limits.max_depth,
        value=depth,
    )


def _refuse_extension(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _map_of_pairs(pairs: list[tuple[object, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError("a key is not text")
        if key in result:
            raise ValueError("a key occurs twice in one map")
        result[key] = value
    return result


def _check_value(value: object, where: str, limits: FrameLimits, depth: int) -> None:
    if value is None or isinstance(value, (bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise MalformedFrame("a number is not finite", field=where, value=str(value))
    elif isinstance(value, str):
        check_text(value, where, limits)
    elif isinstance(value, (dict, list)):
        _check_size(value, where, limits, depth)
        if isinstance(value, dict):
            for key, item in value.items():
                check_text(key, where, limits)
                _check_value(item, f"{where}.{key}", limits, depth + 1)
        else:
            for index, item in enumerate(value):
                _check_value(item, f"{where}.{index}", limits, depth + 1)
    else:
        raise MalformedFrame(
            "no frame carries a value of this type", field=where, value=type(value).__name__
        )


def _check_size(
    value: dict[str, Any] | list[Any], where: str, limits: FrameLimits, depth: int
) -> None:
    if depth > limits.max_depth:
        raise _too_deep(where, limits, depth)
    if len(value) > limits.max_items:
        raise TooLarge(
            "a list or map is too long", field=where, limit=limits.max_items, value=len(value)
        )
