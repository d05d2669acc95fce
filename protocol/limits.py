"""Upper bounds on what one end accepts from the other, checked before memory is taken."""

from __future__ import annotations

from dataclasses import dataclass, fields

from protocol.errors import InvalidField

__all__ = ["DEFAULT_LIMITS", "MIB", "FrameLimits"]

MIB = 1024 * 1024


@dataclass(frozen=True)
class FrameLimits:
    """Bounds of one frame. All of them can be set; none can be switched off.

    Raises:
        InvalidField: a bound below 1.
    """

    max_frame_bytes: int = 256 * MIB  # header, buffers and padding together
    max_header_bytes: int = 256 * 1024  # the msgpack part alone
    max_tensors: int = 512
    max_dims: int = 5
    max_elements: int = 256 * MIB  # of one tensor; a dimension of zero counts as one
    max_text: int = 256  # bytes of a name, a key or a text, in UTF-8
    max_items: int = 4096  # of one list or map in the meta part
    max_depth: int = 8  # lists and maps within each other in the meta part

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if value < 1:
                raise InvalidField("a limit is at least 1", field=bound.name, limit=1, value=value)


DEFAULT_LIMITS = FrameLimits()
