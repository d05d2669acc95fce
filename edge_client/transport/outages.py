"""Tell once when the server falls silent, and once when it answers again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SILENCE_S = 10.0  # without a byte, after which a person is told

Tell = Callable[[str, str], None]  # kind of the event, and its message


class Outages:
    """The server's silence, as a person should hear of it. Thread-safe.

    Args:
        tell: receives ``silence`` and ``back``, each with a sentence.
        clock: seconds.
    """

    def __init__(self, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._since: float | None = None
        self._told = False
        self._lock = threading.Lock()

    def silent(self, seconds: float) -> None:
        """Note that a request has had no byte of its response for so long."""
        if self._begin(seconds, tells=True):
            self._tell("silence", f"no answer from the server for {seconds:.0f} s")

    def failed(self) -> None:
        """Note that a request got no response of the server; its error is shown elsewhere."""
        self._begin(0.0, tells=False)

    def heard(self) -> None:
        """Note a response of the server."""
        with self._lock:
            since, self._since, self._told = self._since, None, False
        if since is not None:
            seconds = self._clock() - since
            self._tell("back", f"the server answers again, after {seconds:.0f} s")

    def _begin(self, seconds: float, *, tells: bool) -> bool:
        with self._lock:
            if self._since is None:
                self._since = self._clock() - seconds
            is_first = tells and not self._told
            self._told = self._told or tells
            return is_first
