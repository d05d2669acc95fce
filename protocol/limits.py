"""The limits of a frame, which a receiver checks before it allocates memory."""

from __future__ import annotations

from dataclasses import dataclass, fields

from protocol.errors import InvalidField

__all__ = ["DEFAULT_LIMITS", "MIB", "FrameLimits"]

MIB = 1024 * 1024


@dataclass(frozen=True)
class FrameLimits:
    """The limits of one frame. Each can be set; none can be disabled.

    Raises:
        InvalidField: a limit is below 1.
    """

    max_frame_bytes: int = 256 * MIB  # header, buffers and padding together
    max_header_bytes: int = 256 * 1024  # the msgpack part alone
    max_tensors: int = 512
    max_dims: int = 5
    max_elements: int = 256 * MIB  # elements of one tensor; a dimension of zero counts as one
    max_text: int = 256  # UTF-8 bytes of a name, a key or a text
    max_items: int = 4096  # items of one list or map in the meta part
    max_depth: int = 8  # nesting of lists and maps in the meta part

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value < 1:
                raise InvalidField(
                    "a frame limit must be at least 1", field=limit.name, limit=1, value=value
                )


DEFAULT_LIMITS = FrameLimits()
