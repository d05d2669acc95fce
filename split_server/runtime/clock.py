"""Time, handed in, so that a test can let an hour pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """The two times: one for how long, one for when."""

    monotonic: Callable[[], float] = time.monotonic  # seconds, never back
    wall: Callable[[], float] = time.time  # seconds since 1970
