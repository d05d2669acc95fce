"""The registry of all runs: snapshots in memory; each change takes a lock and a transaction."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session

from protocol.errors import Forbidden, NotFound, Removed
from protocol.messages import RoundStatus
from split_server.federation.snapshot import Participant, RunSnapshot, load_snapshot
from split_server.runtime.process import Clock
from split_server.storage.data_dir import run_folders
from split_server.storage.database import RunRow, Store, UpdateRow
from split_server.storage.events import IdempotentRequest
from split_server.storage.run_files import RunFiles
from split_server.storage.traffic import Meter

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Receives the federation's events. Called from any thread; must not block."""

    def changed(self, run_id: str) -> None:
        """A run has changed."""

    def round_over(self, run_id: str) -> None:
        """The run's last round is over: its training steps cannot continue."""

    def run_over(self, run_id: str) -> None:
        """The run has ended; it does not train or evaluate any more."""

    def left(self, run_id: str, participant_id: str) -> None:
        """A participant has left its run permanently."""

    def update_settled(self, run_id: str, participant_id: str) -> None:
        """The open round has counted or refused a participant's update."""

    def work(self, run_id: str) -> Mapping[str, float]:
        """Return the amounts of work for a run since the server started, by name."""


class RunRegistry:
    """The registry of all runs of a server. Thread-safe.

    The database is authoritative. After each change, the run is read into a new immutable snapshot,
    which readers use without a lock.

    Args:
        data_dir: data folder of the server.
        store: the database.
        meter: counts the traffic of the participants.
        watcher: receives the events of the runs.
        clock: monotonic and wall time.
    """

    def __init__(
        self, data_dir: Path, store: Store, meter: Meter, watcher: Watcher, clock: Clock
    ) -> None:
        self.data_dir = data_dir
        self.store = store
        self.meter = meter
        self.watcher = watcher
        self.clock = clock
        self.refusals: Counter[str] = Counter()  # refused updates by run, since the server started
        self._snapshots: dict[str, RunSnapshot] = {}
        self._locks: dict[str, threading.RLock] = {}

    @property
    def cache_dir(self) -> Path:
        """The folder of downloaded backbones and of weights derived from them."""
        return self.data_dir / "backbones"

    def load(self) -> None:
        """Load all runs from the database, and remove unreferenced files."""
        with self.store.reading() as session:
            self.meter.load(session)
            run_ids = list(session.scalars(select(RunRow.id)))
        for run_id in run_ids:
            self.reload(run_id)
            self.files(run_id).sweep_temporary()
            self.sweep(run_id, self._snapshots[run_id])
        for folder in run_folders(self.data_dir):
            if folder.name not in self._snapshots:
                log.info("removing %s: the creation of this run was interrupted", folder)
                RunFiles(folder).remove()

    def snapshot(self, run_id: str) -> RunSnapshot:
        """Return a run's newest snapshot.

        Raises:
            NotFound: there is no such run.
        """
        snapshot = self._snapshots.get(run_id)
        if snapshot is None:
            raise NotFound("there is no such run", field="run", value=run_id)
        return snapshot

    def has(self, run_id: str) -> bool:
        """Whether there is such a run."""
        return run_id in self._snapshots

    def snapshots(self) -> list[RunSnapshot]:
        """Return all runs, the oldest first."""
        return sorted(self._snapshots.values(), key=lambda run: (run.created_at, run.id))

    def open_runs(self) -> list[str]:
        """Return the ids of the runs that are not over."""
        return [run.id for run in list(self._snapshots.values()) if not run.status.is_over]

    def participant(self, run_id: str, participant_id: str) -> tuple[RunSnapshot, Participant]:
        """Return a participant that has not left, and its run.

        Raises:
            NotFound: no such run or participant.
            Removed: the operator removed the participant.
            Forbidden: it has left.
        """
        snapshot = self.snapshot(run_id)
        participant = _participant_in(snapshot, participant_id)
        require_not_removed(participant)
        if participant.left:
            raise Forbidden(
                "this participant has left the run", field="participant", value=participant_id
            )
        return snapshot, participant

    def has_left(self, run_id: str, participant_id: str) -> bool:
        """Whether a participant has left its run.

        Raises:
            NotFound: no such run or participant.
        """
        return _participant_in(self.snapshot(run_id), participant_id).left

    def files(self, run_id: str) -> RunFiles:
        """Return the files of a run."""
        return RunFiles(self.data_dir / "runs" / run_id)

    def is_known(self, idempotent: IdempotentRequest) -> bool:
        """Whether a request with this idempotency key was answered, with any content."""
        with self.store.reading() as session:
            return idempotent.is_known(session)

    def recall(self, idempotent: IdempotentRequest) -> dict[str, Any] | None:
        """Return the stored response to a repeated request, or None if it is new."""
        with self.store.reading() as session:
            return idempotent.recall(session)

    @contextmanager
    def changing(self, run_id: str) -> Iterator[Session]:
        """Open a transaction on a run; readers see the change after it is on disk."""
        self.snapshot(run_id)
        with self.lock(run_id):
            self.snapshot(run_id)  # again: the run may have been deleted meanwhile
            with self.store.writing() as session:
                yield session
            self.reload(run_id)
        self.watcher.changed(run_id)

    def forget(self, run_id: str) -> None:
        """Forget a run whose rows have been deleted."""
        self._snapshots.pop(run_id, None)
        self.refusals.pop(run_id, None)
        self.meter.forget(run_id)

    def lock(self, run_id: str) -> threading.RLock:
        """Return the lock that each change of a run must hold."""
        return self._locks.setdefault(run_id, threading.RLock())

    def reload(self, run_id: str) -> None:
        """Read a run from the database into a new snapshot.

        The deadline of an open phase is kept in memory only. A new phase gets a new deadline.
        """
        with self.store.reading() as session:
            fresh = load_snapshot(session, run_id, self.data_dir)
        old = self._snapshots.get(run_id)
        deadline: float | None = None
        if fresh.open_round is not None:
            if (
                old is not None
                and old.open_round is not None
                and old.open_round.key == fresh.open_round.key
            ):
                deadline = old.deadline
            else:
                timeout = fresh.plan.federation.round_timeout_s
                deadline = self.clock.monotonic() + timeout
        self._snapshots[run_id] = replace(fresh, deadline=deadline)

    def sweep(self, run_id: str, before: RunSnapshot) -> None:
        """Remove the tensors of updates of closed rounds, and old server-side states.

        The database keeps the metadata of the updates.

        Args:
            run_id: the run.
            before: the run before its last change, whose server-side state may still be in use.
        """
        run = self._snapshots[run_id]
        wanted_states = [before.state, run.state, *([run.best.refs] if run.best else [])]
        self.files(run_id).prune_server_states(
            refs.server.sha256 for refs in wanted_states if refs.server
        )
        wanted: list[str] = []
        if run.open_round is not None and run.open_round.status == RoundStatus.TRAINING:
            with self.store.reading() as session:
                wanted = list(
                    session.scalars(
                        select(UpdateRow.sha256).where(
                            UpdateRow.run_id == run_id,
                            UpdateRow.round == run.open_round.round,
                            UpdateRow.attempt == run.open_round.attempt,
                        )
                    )
                )
        self.files(run_id).prune_updates(wanted)
        if run.status.is_over:
            self.files(run_id).drop_known()

    def drop_labels(self, run_id: str, participant_id: str) -> None:
        """Remove the labels and features of a participant that shared its labels."""
        if self.snapshot(run_id).plan.shares_labels:
            self.files(run_id).drop_labels(participant_id)

    def save_traffic(self) -> None:
        """Save the meter's counts to the database, so that a crash loses few of them."""
        unsaved = self.meter.take_dirty()
        try:
            for run_id in list(unsaved):
                if run_id in self._snapshots:
                    with self.store.writing() as session:
                        self.meter.save(session, run_id)
                unsaved.discard(run_id)
        finally:
            self.meter.mark_dirty(unsaved)


def require_not_removed(participant: Participant) -> None:
    """Refuse a participant that the operator removed.

    Raises:
        Removed: it was.
    """
    if participant.removed:
        raise Removed(
            "the operator removed this participant from the run",
            field="participant",
            value=participant.id,
            hint="ask the server's operator",
        )


def _participant_in(run: RunSnapshot, participant_id: str) -> Participant:
    participant = run.participants.get(participant_id)
    if participant is None:
        raise NotFound("there is no such participant", field="participant", value=participant_id)
    return participant
