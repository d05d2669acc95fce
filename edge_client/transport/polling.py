"""How long a long poll may wait: as long as everything between device and server allows."""

from __future__ import annotations

from protocol.errors import SFPromptError
from protocol.untyped import STATUS_FIELD

_SHORTEST_S = 1.0


class PollWait:
    """Learns the longest wait that a poll survives.

    An HTTP proxy that waits less than a poll answers in the server's place, and a router may forget
    a connection that is silent for too long. A poll then waits half as long as the one that failed.
    """

    def __init__(self) -> None:
        self._limit: float | None = None
        self._has_broken = False

    def bounded(self, seconds: float) -> float:
        """Return how long to wait, at most ``seconds``."""
        return seconds if self._limit is None else min(seconds, self._limit)

    def failed(self, error: SFPromptError, elapsed: float) -> None:
        """Learn from a failed poll.

        Args:
            error: the poll's.
            elapsed: seconds from the request to the error.
        """
        if elapsed < _SHORTEST_S:
            return  # the server is away: a shorter wait changes nothing
        if error.field == STATUS_FIELD or self._has_broken:
            self._limit = max(_SHORTEST_S, elapsed / 2)
        self._has_broken = True  # once may be the server's end

    def succeeded(self) -> None:
        """Note that a poll was answered."""
        self._has_broken = False
