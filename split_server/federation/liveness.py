"""Tracks participants with recent requests."""

from __future__ import annotations

import threading

from split_server.runtime.process import Clock


class Liveness:
    """Stores until when each participant counts as live. In memory only; a restart resets it."""

    def __init__(self, window_s: float, clock: Clock) -> None:
        self._window_s = window_s
        self._clock = clock
        self._started = clock.monotonic()
        self._until: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()

    def touch(self, run_id: str, participant_id: str, wait_s: float = 0.0) -> None:
        """Record a request. The participant is live for the window, or 2 * ``wait_s`` if longer."""
        until = self._clock.monotonic() + max(self._window_s, 2 * wait_s)
        with self._lock:
            of_run = self._until.setdefault(run_id, {})
            of_run[participant_id] = max(until, of_run.get(participant_id, until))

    def forget(self, run_id: str, participant_id: str | None = None) -> None:
        """Forget one participant, or a whole run."""
        with self._lock:
            if participant_id is None:
                self._until.pop(run_id, None)
            else:
                self._until.get(run_id, {}).pop(participant_id, None)

    def live(self, run_id: str) -> set[str]:
        """Return the ids of the live participants."""
        now = self._clock.monotonic()
        with self._lock:
            return {id_ for id_, until in self._until.get(run_id, {}).items() if until > now}

    @property
    def settled(self) -> bool:
        """Whether the server has been up for the window: it knows all live participants."""
        return self._clock.monotonic() - self._started >= self._window_s
