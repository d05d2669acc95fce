"""Room for the bodies of requests, taken before a byte of them is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import Busy

_RETRY_S = 0.25


class Room:
    """A bound on the bytes of all requests that are being read or worked on.

    Used on the event loop alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Hold ``nbytes`` for one request. One is always let in, however large.

        Raises:
            Busy: the rest is taken.
        """
        if self._taken and self._taken + nbytes > self._limit:
            raise Busy(
                "too many requests are being read; try again later",
                field="queue_mib",
                limit=self._limit,
                value=self._taken + nbytes,
                retry_after_s=_RETRY_S,
            )
        self._taken += nbytes
        try:
            yield
        finally:
            self._taken -= nbytes
