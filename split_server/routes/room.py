"""Room for the bodies of requests, taken as their bytes come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protocol.errors import Busy


class Room:
    """A bound on the bytes of all requests that are being read or worked on.

    Used on the event loop alone.

    Args:
        limit: in bytes.
        busy: makes the refusal, which says when the queue will have been worked off.
    """

    def __init__(self, limit: int, busy: Callable[[str], Busy]) -> None:
        self._limit = limit
        self._busy = busy
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes that are held now."""
        return self._taken

    @contextmanager
    def claim(self) -> Iterator[Claim]:
        """One request's share, given back at the end."""
        claim = Claim(self)
        try:
            yield claim
        finally:
            self._taken -= claim.nbytes

    def take(self, nbytes: int, held: int) -> None:
        """Hold ``nbytes`` more for a request that holds ``held``. One alone is always let in.

        Raises:
            Busy: the rest is taken.
        """
        if self._taken > held and self._taken + nbytes > self._limit:
            refusal = self._busy("too many requests are being read")
            refusal.field, refusal.limit = "queue_mib", self._limit
            refusal.value = self._taken + nbytes
            raise refusal
        self.hold(nbytes)

    def hold(self, nbytes: int) -> None:
        """Hold ``nbytes`` more that are there already."""
        self._taken += nbytes


class Claim:
    """What one request holds of a `Room`.

    It grows with the bytes that have come, not with those that were announced: whoever sends
    slowly keeps little from the others.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        """Take room for bytes that have come.

        Raises:
            Busy: there is none.
        """
        self._room.take(nbytes, self.nbytes)
        self.nbytes += nbytes

    def hold(self, nbytes: int) -> None:
        """Count the bytes of an answer: it is not refused, but others may be while it is sent."""
        self._room.hold(nbytes)
        self.nbytes += nbytes
