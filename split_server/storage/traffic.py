"""Bytes at the socket, both ways, by participant and phase."""

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
    """What has passed through one connection and not been attributed yet.

    ``pending`` holds requests that showed no credential: a device that looks at a run before it
    joins is charged for that when it has joined. ``last`` remembers whom to charge for bytes that
    come after the answer: a body that was refused while it was still being sent.
    """

    received: int = 0
    sent: int = 0
    pending: Traffic = field(default_factory=Traffic)
    last: tuple[str, str, str] | None = None  # run, participant, path

    def take(self) -> tuple[int, int]:
        """The bytes (up, down) since the last call."""
        taken = self.received, self.sent
        self.received = self.sent = 0
        return taken

    def defer(self, path: str) -> None:
        """Keep the bytes of a request for whoever turns out to be at the other end."""
        self.pending.add(path, *self.take())


class Meter:
    """Totals of every participant. Counted on the event loop, read from any thread."""

    def __init__(self) -> None:
        self._totals: dict[str, dict[str, Traffic]] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()

    def charge(self, counter: SocketCounter, run: str, participant: str, path: str) -> None:
        """Put what a connection has counted on a participant's account."""
        counter.last = (run, participant, path)
        up, down = counter.take()
        if not up and not down and not counter.pending.total():
            return
        pending, counter.pending = counter.pending, Traffic()
        with self._lock:
            account = self._account(run, participant)
            account.merge(pending)
            if up or down:
                account.add(path, up, down)
            self._dirty.add(run)

    def participant(self, run: str, participant: str) -> Traffic:
        """All of one participant's bytes so far."""
        with self._lock:
            return self._account(run, participant).copy()

    def run(self, run: str) -> Traffic:
        """All bytes of a run's participants so far."""
        total = Traffic()
        with self._lock:
            for traffic in self._totals.get(run, {}).values():
                total.merge(traffic)
        return total

    def load(self, session: Session) -> None:
        """Begin with what was saved before a restart."""
        rows = session.execute(
            select(ParticipantRow.run_id, ParticipantRow.id, ParticipantRow.traffic)
        )
        with self._lock:
            for run, participant, traffic in rows:
                self._account(run, participant).merge(Traffic.from_dict(traffic))

    def save(self, session: Session, run: str) -> None:
        """Write a run's totals."""
        with self._lock:
            totals = {
                participant: traffic.to_dict()
                for participant, traffic in self._totals.get(run, {}).items()
            }
        self._write(session, run, totals)

    def take_dirty(self) -> set[str]:
        """The runs with bytes that have not been saved; they count as saved from here on."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        return dirty

    def not_saved(self, runs: Iterable[str]) -> None:
        """Saving these has failed: they have bytes to be saved still."""
        with self._lock:
            self._dirty.update(runs)

    def _write(self, session: Session, run: str, totals: Mapping[str, Mapping[str, Any]]) -> None:
        rows = session.scalars(select(ParticipantRow).where(ParticipantRow.run_id == run))
        for row in rows:
            row.traffic = dict(totals.get(row.id, row.traffic))

    def _account(self, run: str, participant: str) -> Traffic:
        return self._totals.setdefault(run, {}).setdefault(participant, Traffic())
