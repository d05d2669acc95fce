"""Who has been heard of lately."""

from __future__ import annotations

import threading

from split_server.runtime.process import Clock


class Liveness:
    """Remembers until when each participant counts as live. Lost at a restart, on purpose."""

    def __init__(self, window_s: float, clock: Clock) -> None:
        self._window_s = window_s
        self._clock = clock
        self._started = clock.monotonic()
        self._until: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()

    def touch(self, run: str, participant: str, wait_s: float = 0.0) -> None:
        """A request has come; the next may take as long as the window, or twice ``wait_s``."""
        until = self._clock.monotonic() + max(self._window_s, 2 * wait_s)
        with self._lock:
            of_run = self._until.setdefault(run, {})
            of_run[participant] = max(until, of_run.get(participant, until))

    def forget(self, run: str, participant: str | None = None) -> None:
        """Drop one participant, or a whole run."""
        with self._lock:
            if participant is None:
                self._until.pop(run, None)
            else:
                self._until.get(run, {}).pop(participant, None)

    def live(self, run: str) -> set[str]:
        """The participants that are live now."""
        now = self._clock.monotonic()
        with self._lock:
            return {one for one, until in self._until.get(run, {}).items() if until > now}

    @property
    def settled(self) -> bool:
        """Whether everybody who is alive has had the time to call since the server started."""
        return self._clock.monotonic() - self._started >= self._window_s
