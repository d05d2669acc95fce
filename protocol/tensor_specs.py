"""The descriptions of a frame's tensors in its header, and the checks of a received one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.codecs import get_codec
from protocol.errors import MalformedFrame, TooLarge
from protocol.header import check_text
from protocol.limits import FrameLimits

__all__ = ["TensorSpec", "read_spec"]

_SPEC_KEYS = {"name", "codec", "shape", "sizes"}


@dataclass(frozen=True)
class TensorSpec:
    """The description of one tensor in a header."""

    name: str
    codec: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]  # bytes of each buffer

    def to_wire(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "codec": self.codec,
            "shape": list(self.shape),
            "sizes": list(self.sizes),
        }


def read_spec(raw: Any, limits: FrameLimits) -> TensorSpec:
    """Check the description of one tensor.

    Raises:
        MalformedFrame: it is none, or its codec never writes these sizes for this shape.
        TooLarge: a length is over its limit.
        UnknownCodec: this end does not have its codec.
    """
    if not isinstance(raw, dict) or set(raw) != _SPEC_KEYS:
        raise MalformedFrame(
            "a tensor must be described by exactly name, codec, shape and sizes",
            field="tensors",
            limit=sorted(_SPEC_KEYS),
            value=sorted(raw) if isinstance(raw, dict) else type(raw).__name__,
        )
    name, codec = raw["name"], raw["codec"]
    if not isinstance(name, str) or not isinstance(codec, str) or not name:
        raise MalformedFrame(
            "a tensor's name and codec must be text, the name not empty",
            field="tensors",
            limit=["str", "str"],
            value=[name and type(name).__name__, type(codec).__name__],
        )
    check_text(name, "tensors.name", limits)
    check_text(codec, f"{name}.codec", limits)
    shape = tuple(_read_naturals(raw["shape"], f"{name}.shape"))
    sizes = tuple(_read_naturals(raw["sizes"], f"{name}.sizes"))
    _check_shape(name, shape, limits)
    try:
        get_codec(codec).check_sizes(shape, sizes)
    except MalformedFrame as error:
        error.field = f"{name}.sizes"
        raise
    return TensorSpec(name, codec, shape, sizes)


def _check_shape(name: str, shape: Sequence[int], limits: FrameLimits) -> None:
    if len(shape) > limits.max_dims:
        raise TooLarge(
            "a tensor has too many dimensions",
            field=f"{name}.shape",
            limit=limits.max_dims,
            value=len(shape),
        )
    # A zero counts as one, so that it cannot hide dimensions whose strides overflow.
    elements = math.prod(max(size, 1) for size in shape)
    if elements > limits.max_elements:
        raise TooLarge(
            "a tensor has too many elements",
            field=f"{name}.shape",
            limit=limits.max_elements,
            value=list(shape),
        )


def _read_naturals(raw: Any, where: str) -> Iterator[int]:
    if not isinstance(raw, list):
        raise MalformedFrame(
            "must be a list of integers",
            field=where,
            limit="list",
            value=type(raw).__name__,
        )
    for number in raw:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise MalformedFrame(
                "must be an integer of at least 0",
                field=where,
                limit=0,
                value=number if isinstance(number, (int, float)) else type(number).__name__,
            )
        yield number
