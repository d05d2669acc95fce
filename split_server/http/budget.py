"""The memory budget of all requests: received bodies, decoded tensors and responses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protocol.errors import Busy

_STALL_S = 2.0  # a body without progress for this time may be cancelled for other requests

_PROGRESS_BYTES = 4096  # fewer received bytes are not progress


class BodyBudget:
    """The memory budget of all requests that are being received, processed or answered.

    Thread-safe: frames are decoded on threads.

    Args:
        limit: the budget in bytes.
        busy_error: creates the error for a message, with an estimate of when to retry.
        clock: returns seconds on a monotonic clock.
    """

    def __init__(
        self,
        limit: int,
        busy_error: Callable[[str], Busy],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._busy_error = busy_error
        self._clock = clock
        self._taken = 0
        self._open: set[Reservation] = set()
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes in use."""
        return self._taken

    @property
    def now(self) -> float:
        """Seconds on the monotonic clock."""
        return self._clock()

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """Open the reservation of one request, which is released at the end of the block."""
        reservation = Reservation(self)
        with self._lock:
            self._open.add(reservation)
        try:
            yield reservation
        finally:
            with self._lock:
                self._open.discard(reservation)
                self._taken -= reservation.nbytes

    def take(self, nbytes: int, reservation: Reservation) -> None:
        """Reserve ``nbytes`` more for a request. This always succeeds for a single request.

        Raises:
            Busy: other requests use the budget. Stalled bodies among them are cancelled.
        """
        with self._lock:
            wanted = self._taken + nbytes
            if self._taken <= reservation.nbytes or wanted <= self._limit:
                self._taken = wanted
                return
            stalled = [each for each in self._open - {reservation} if each.has_stalled(self.now)]
        refusal = self.full(wanted)
        for each in stalled:
            each.cancel(self.full(wanted))
        raise refusal

    def full(self, wanted: int) -> Busy:
        """Create the error for a request that does not fit into the budget."""
        refusal = self._busy_error("the server is receiving too many requests")
        refusal.field, refusal.limit, refusal.value = "queue_mib", self._limit, wanted
        return refusal

    def change(self, nbytes: int) -> None:
        """Add ``nbytes`` to the memory in use; a negative number releases memory."""
        with self._lock:
            self._taken += nbytes


class Reservation:
    """One request's part of a `BodyBudget`.

    It grows with the received bytes, not with the declared length, so that a slow client reserves
    little.

    Attributes:
        nbytes: all reserved bytes.
        on_cancel: called with an error when other requests need the memory of this body, which has
            stalled; None: the body is complete.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._decoded = self._response = self._since_progress = 0
        self._progress_at = budget.now
        self.nbytes = 0
        self.on_cancel: Callable[[Busy], None] | None = None

    def add(self, nbytes: int) -> None:
        """Reserve memory for received bytes.

        Raises:
            Busy: the budget is used up.
        """
        self._take(nbytes)
        self._since_progress += nbytes
        if self._since_progress >= _PROGRESS_BYTES:
            self._since_progress, self._progress_at = 0, self._budget.now

    def add_decoded(self, nbytes: int) -> None:
        """Reserve memory for tensors that are about to be decoded.

        Raises:
            Busy: the budget is used up.
        """
        self._take(nbytes)
        self._decoded += nbytes

    def release_decoded(self) -> None:
        """Release the memory of the decoded tensors, which the engine counts from now on."""
        self._change(-self._decoded)
        self._decoded = 0

    def expect_response(self, nbytes: int) -> None:
        """Reserve memory for a response before it is computed.

        Raises:
            Busy: the budget is used up.
        """
        self._take(nbytes)
        self._response += nbytes

    def add_response(self, nbytes: int) -> None:
        """Replace the expected bytes of the response by the actual ones; never refused."""
        self._change(nbytes - self._response)
        self._response = nbytes

    def has_stalled(self, now: float) -> bool:
        """Whether the body is incomplete and has made no progress for `_STALL_S`."""
        return self.on_cancel is not None and now - self._progress_at > _STALL_S

    def cancel(self, error: Busy) -> None:
        """Cancel a stalled body."""
        if self.on_cancel is not None:
            self.on_cancel(error)

    def _take(self, nbytes: int) -> None:
        self._budget.take(nbytes, self)
        self.nbytes += nbytes

    def _change(self, nbytes: int) -> None:
        self._budget.change(nbytes)
        self.nbytes += nbytes
