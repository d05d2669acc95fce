"""Traffic: bytes at the socket, in both directions, by participant and phase."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from protocol.traffic import Traffic
from split_server.storage.database import ParticipantRow


@dataclass
class SocketCounter:
    """Bytes of one connection that no participant has been charged with yet.

    Attributes:
        pending: bytes of requests without a credential. A device that reads a run before it joins
            is charged with them once it has joined.
        last: run, participant and path to charge with bytes that arrive after the response, such
            as the rest of a refused request.
    """

    received: int = 0
    sent: int = 0
    pending: Traffic = field(default_factory=Traffic)
    last: tuple[str, str, str] | None = None

    def take(self) -> tuple[int, int]:
        """Return and reset the bytes (up, down) since the last call."""
        taken = self.received, self.sent
        self.received = self.sent = 0
        return taken

    def defer(self, path: str) -> None:
        """Move a request's bytes to ``pending``, until the participant is known."""
        self.pending.add(path, *self.take())


class Meter:
    """Traffic totals of all participants. Thread-safe."""

    def __init__(self) -> None:
        self._totals: dict[str, dict[str, Traffic]] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()

    def charge(self, counter: SocketCounter, run: str, participant: str, path: str) -> None:
        """Charge a participant with a connection's bytes."""
        counter.last = (run, participant, path)
        up, down = counter.take()
        if not up and not down and not counter.pending.total():
            return
        pending, counter.pending = counter.pending, Traffic()
        with self._lock:
            total = self._total(run, participant)
            total.merge(pending)
            if up or down:
                total.add(path, up, down)
            self._dirty.add(run)

    def participant(self, run: str, participant: str) -> Traffic:
        """Return a participant's traffic so far."""
        with self._lock:
            return self._total(run, participant).copy()

    def run(self, run: str) -> Traffic:
        """Return the traffic of all participants of a run so far."""
        total = Traffic()
        with self._lock:
            for traffic in self._totals.get(run, {}).values():
                total.merge(traffic)
        return total

    def load(self, session: Session) -> None:
        """Load the totals that were saved before a restart."""
        rows = session.execute(
            select(ParticipantRow.run_id, ParticipantRow.id, ParticipantRow.traffic)
        )
        with self._lock:
            for run, participant, traffic in rows:
                self._total(run, participant).merge(Traffic.from_dict(traffic))

    def forget(self, run: str) -> None:
        """Forget a run's totals."""
        with self._lock:
            self._totals.pop(run, None)
            self._dirty.discard(run)

    def save(self, session: Session, run: str) -> None:
        """Save a run's totals."""
        with self._lock:
            totals = {
                participant: traffic.to_dict()
                for participant, traffic in self._totals.get(run, {}).items()
            }
        self._write(session, run, totals)

    def take_dirty(self) -> set[str]:
        """Return the runs with unsaved bytes, and mark them as saved."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        return dirty

    def mark_dirty(self, runs: Iterable[str]) -> None:
        """Mark runs as unsaved again, after a failure to save them."""
        with self._lock:
            self._dirty.update(runs)

    def _write(self, session: Session, run: str, totals: Mapping[str, Mapping[str, Any]]) -> None:
        rows = session.scalars(select(ParticipantRow).where(ParticipantRow.run_id == run))
        for row in rows:
            row.traffic = dict(totals.get(row.id, row.traffic))

    def _total(self, run: str, participant: str) -> Traffic:
        return self._totals.setdefault(run, {}).setdefault(participant, Traffic())
