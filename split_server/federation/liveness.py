"""Tracks which participants send requests, have ended, or miss rounds."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from split_server.runtime.process import Clock

_JUST_NOW_S = 1.0  # who was heard from since then is there

_MAX_MISSES = 5  # above this, the pauses of a participant grow no longer


@dataclass
class _Attendance:
    """Who is there in one run.

    Attributes:
        heard: time of each participant's last request, on the monotonic clock.
        until: when it stops counting as live.
        away: participants that told that they end, until their next request.
        misses: rounds in a row that a participant was drawn for and did not answer.
        pauses: the number of openings from which a participant is drawn again.
        openings: attempts at rounds so far.
        silent: participants whose silence has been noted.
    """

    heard: dict[str, float] = field(default_factory=dict)
    until: dict[str, float] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)
    misses: dict[str, int] = field(default_factory=dict)
    pauses: dict[str, int] = field(default_factory=dict)
    openings: int = 0
    silent: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class PresenceChanges:
    """Ids of the participants that fell silent, and of those that were heard again."""

    silent: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.silent or self.returned)


class Liveness:
    """Stores until when each participant counts as live. In memory only; a restart resets it.

    A participant that misses a round is drawn again once it is heard from. If it misses the next
    one too, it is left out for one round, and for twice as many after each further one.
    """

    def __init__(self, window_s: float, clock: Clock) -> None:
        self._window_s = window_s
        self._clock = clock
        self._started = clock.monotonic()
        self._runs: defaultdict[str, _Attendance] = defaultdict(_Attendance)
        self._lock = threading.Lock()

    def touch(self, run_id: str, participant_id: str, wait_s: float = 0.0) -> None:
        """Record a request. The participant is live for the window, or 2 * ``wait_s`` if longer."""
        now = self._clock.monotonic()
        until = now + max(self._window_s, 2 * wait_s)
        with self._lock:
            run = self._runs[run_id]
            run.heard[participant_id] = now
            run.until[participant_id] = max(until, run.until.get(participant_id, until))
            run.away.discard(participant_id)

    def forget(self, run_id: str, participant_id: str | None = None) -> None:
        """Forget one participant, or a whole run."""
        with self._lock:
            if participant_id is None:
                self._runs.pop(run_id, None)
            else:
                self._runs[run_id].until.pop(participant_id, None)

    def end(self, run_id: str, participant_id: str) -> bool:
        """Record that a participant ends; return whether that is new."""
        with self._lock:
            run = self._runs[run_id]
            is_new = participant_id not in run.away
            run.until.pop(participant_id, None)
            run.away.add(participant_id)
            return is_new

    def opened(self, run_id: str) -> None:
        """Record that an attempt at a round has begun."""
        with self._lock:
            self._runs[run_id].openings += 1

    def closed(self, run_id: str, answered: Iterable[str], missed: Iterable[str]) -> None:
        """Record who answered in an attempt at a round, and who was drawn and did not."""
        silent_since = self._clock.monotonic() - _JUST_NOW_S
        with self._lock:
            run = self._runs[run_id]
            for id_ in answered:
                run.misses.pop(id_, None)
                run.pauses.pop(id_, None)
            for id_ in missed:
                if run.heard.get(id_, silent_since) <= silent_since:
                    run.until.pop(id_, None)
                if id_ in run.away:
                    continue  # it has told
                misses = run.misses[id_] = min(run.misses.get(id_, 0) + 1, _MAX_MISSES)
                run.pauses[id_] = run.openings + 2 ** (misses - 1) - 1

    def live(self, run_id: str) -> set[str]:
        """Return the ids of the live participants."""
        now = self._clock.monotonic()
        with self._lock:
            return {id_ for id_, until in self._runs[run_id].until.items() if until > now}

    def heard_ago(self, run_id: str) -> dict[str, float]:
        """Return the seconds since each participant's last request, by id."""
        now = self._clock.monotonic()
        with self._lock:
            return {id_: now - heard for id_, heard in self._runs[run_id].heard.items()}

    def changes(self, run_id: str, present: Iterable[str]) -> PresenceChanges:
        """Return which of these participants fell silent or came back since the last `note`.

        Who has told that it ends is not silent; after a start of the server, nobody is for the
        first window.
        """
        now = self._clock.monotonic()
        is_settled = now - self._started >= self._window_s
        silent, returned = [], []
        with self._lock:
            run = self._runs[run_id]
            for id_ in present:
                is_live = run.until.get(id_, 0.0) > now
                is_known = id_ in run.heard or is_settled
                if is_live and id_ in run.silent:
                    returned.append(id_)
                elif not is_live and is_known and id_ not in run.away | run.silent:
                    silent.append(id_)
        return PresenceChanges(tuple(silent), tuple(returned))

    def note(self, run_id: str, changes: PresenceChanges) -> None:
        """Note that these changes are recorded."""
        with self._lock:
            silent = self._runs[run_id].silent
            silent.update(changes.silent)
            silent.difference_update(changes.returned)

    def away(self, run_id: str) -> set[str]:
        """Return the ids of the participants that have ended."""
        with self._lock:
            return set(self._runs[run_id].away)

    def pausing(self, run_id: str) -> set[str]:
        """Return the ids of the participants to leave out of the next round if others are there."""
        with self._lock:
            run = self._runs[run_id]
            return {id_ for id_, until in run.pauses.items() if until > run.openings}

    def is_settled(self, run_id: str, participants: Iterable[str]) -> bool:
        """Whether these have called since the server started, or have had time to."""
        if self._clock.monotonic() - self._started >= self._window_s:
            return True
        with self._lock:
            run = self._runs[run_id]
            return all(id_ in run.heard or id_ in run.away for id_ in participants)
