"""Upper bounds on what one end accepts from the other, checked before memory is taken."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class FrameLimits:
    """Bounds of one frame. All of them can be set; none can be switched off."""

    max_frame_bytes: int = 256 * MIB  # header, buffers and padding together
    max_header_bytes: int = 256 * 1024  # the msgpack part alone
    max_tensors: int = 512
    max_dims: int = 5
    max_text: int = 256  # characters of a name or a key


DEFAULT_LIMITS = FrameLimits()
