"""How many samples go into one frame."""

from __future__ import annotations

from protocol.limits import DEFAULT_LIMITS, MIB
from split_model import Head

_FLOAT_BYTES = 4
_HEADER_BYTES = MIB


def samples_in_a_frame(head: Head, most: int) -> int:
    """At most ``most``, and fewer where all their tokens in float32 would be over the limit.

    Tokens are those of the body, prompts included: answers may be as large as what was sent.
    """
    tokens = head.sizes.tokens + head.settings.prompt_count
    row = tokens * head.sizes.width * _FLOAT_BYTES
    return max(1, min(most, (DEFAULT_LIMITS.max_frame_bytes - _HEADER_BYTES) // row))
