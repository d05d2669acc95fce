"""Records in a run's history when a device falls silent, and when it is heard again."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from split_server.federation.liveness import Liveness, PresenceChanges
from split_server.federation.runs import RunRegistry
from split_server.storage.events import record_event

log = logging.getLogger(__name__)

SILENT, RETURNED = "participant_silent", "participant_returned"  # kinds of events


@dataclass(frozen=True)
class Presence:
    """Notes changes of presence. Thread-safe.

    Attributes:
        runs: the registry of all runs.
        liveness: knows who was heard when.
    """

    runs: RunRegistry
    liveness: Liveness

    def has_changed(self, run_id: str) -> bool:
        """Whether there is something to note. Fast, and without a lock of the run."""
        return bool(self._changes(run_id))

    def note(self, run_id: str) -> None:
        """Record an event for each device that fell silent or came back since the last call."""
        with self.runs.lock(run_id):
            changes = self._changes(run_id)
            if not changes:
                return
            at, names = self.runs.clock.wall(), self.runs.snapshot(run_id).participants
            with self.runs.changing(run_id) as session:
                for kind, ids in ((SILENT, changes.silent), (RETURNED, changes.returned)):
                    for id_ in ids:
                        data = {"participant": id_, "name": names[id_].name}
                        record_event(session, run_id, at, kind, **data)
                        log.info("run %s: %s %s", run_id, kind, id_)
            self.liveness.note(run_id, changes)

    def _changes(self, run_id: str) -> PresenceChanges:
        run = self.runs.snapshot(run_id)
        return self.liveness.changes(run_id, [each.id for each in run.present])
