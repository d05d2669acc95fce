"""The runs in memory, one lock and one transaction at a time each, and how they go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session

from protocol.errors import Forbidden, NotFound, SFPromptError
from protocol.messages import RoundStatus, RunStatus
from split_server.federation import rounds, transitions
from split_server.federation.background import Check, RedistillationJobs, Stopped
from split_server.federation.liveness import Liveness
from split_server.federation.snapshot import Member, RunSnapshot, load_snapshot
from split_server.models import prepare
from split_server.runtime.process import Clock
from split_server.storage.data_dir import run_folders
from split_server.storage.database import RunRow, Store, UpdateRow
from split_server.storage.events import IdempotentRequest
from split_server.storage.run_files import RunFiles, relative_to_data_dir
from split_server.storage.traffic import Meter

log = logging.getLogger(__name__)

_RETRY_S = 5.0  # after a run could not go on (a full disk, say)


class Watcher(Protocol):
    """Is told of what happens. Called from any thread; must not block."""

    def changed(self, run: str) -> None:
        """Something in a run is new."""

    def round_over(self, run: str) -> None:
        """No training step of a run can go on."""

    def run_over(self, run: str) -> None:
        """Nothing more is trained or measured in a run."""

    def left(self, run: str, participant: str) -> None:
        """A participant will not come back."""

    def work(self, run: str) -> Mapping[str, float]:
        """What the server has computed for a run since it started, in numbers."""


class Runs:
    """All runs of a server. Methods may be called from many threads at once.

    The database is the truth. After each change a run is read anew into an immutable snapshot,
    which everybody else reads without a lock.

    Args:
        data_dir: where the runs' files and the backbones lie.
        store: the database.
        meter: the bytes of the participants.
        presence: who has been heard of lately.
        watcher: is told of changes.
        clock: the two times.
    """

    def __init__(
        self,
        data_dir: Path,
        store: Store,
        meter: Meter,
        presence: Liveness,
        watcher: Watcher,
        clock: Clock,
    ) -> None:
        self._data_dir = data_dir
        self._store = store
        self._meter = meter
        self._presence = presence
        self._watcher = watcher
        self._clock = clock
        self._runs: dict[str, RunSnapshot] = {}
        self._locks: dict[str, threading.RLock] = {}
        self._not_before: dict[str, float] = {}  # runs that could not go on: when to try again
        self._renewals = RedistillationJobs(self._renew, self._cannot_renew)

    def close(self) -> None:
        """Leave work that takes long for the next start."""
        self._renewals.close()

    def run(self, run_id: str) -> RunSnapshot:
        """A run as it stands.

        Raises:
            NotFound: there is none of this id.
        """
        snapshot = self._runs.get(run_id)
        if snapshot is None:
            raise NotFound("there is no such run", field="run", value=run_id)
        return snapshot

    def member(self, run_id: str, participant: str) -> tuple[RunSnapshot, Member]:
        """A participant in good standing, and its run.

        Raises:
            NotFound: no such run or participant.
            Forbidden: the participant has left.
        """
        snapshot = self.run(run_id)
        member = _member_of(snapshot, participant)
        if member.left:
            raise Forbidden(
                "this participant has left the run", field="participant", value=participant
            )
        return snapshot, member

    def has_left(self, run_id: str, participant: str) -> bool:
        """Whether a participant has left its run.

        Raises:
            NotFound: no such run or participant.
        """
        return _member_of(self.run(run_id), participant).left

    def files(self, run_id: str) -> RunFiles:
        return RunFiles(self._data_dir / "runs" / run_id)

    def open_runs(self) -> list[str]:
        return [run.id for run in list(self._runs.values()) if not run.status.over]

    def load(self) -> None:
        """Take up all runs where they stood when the server stopped."""
        with self._store.reading() as session:
            self._meter.load(session)
            known = list(session.scalars(select(RunRow.id)))
        for run_id in known:
            self._reload(run_id)
            self._sweep(run_id, self._runs[run_id])
        for folder in run_folders(self._data_dir):
            if folder.name not in self._runs:
                log.info("%s is removed: its run was never made", folder)
                RunFiles(folder).remove()

    def due(self, run_id: str) -> bool:
        """Whether `go_on` would change something; cheap, and without a lock."""
        return not self._pauses(run_id) and self._next(run_id) is not None

    def go_on(self, run_id: str, *, wait: bool = True) -> None:
        """Take every step of a run that is due, for somebody whose own request is done without.

        A step that fails is no matter of theirs: it is logged, and the run pauses for a moment,
        whoever asks.

        Args:
            run_id: of the run.
            wait: for whoever changes the run just now. Who will hear of the change anyway need not
                hold a thread for that, of which requests of all runs have few.
        """
        self.run(run_id)
        lock = self._lock(run_id)
        if not lock.acquire(blocking=wait):
            return
        try:
            if not self._pauses(run_id):
                self.advance(run_id)
                self._not_before.pop(run_id, None)
        except Exception:
            self._not_before[run_id] = self._clock.monotonic() + _RETRY_S
            log.exception("run %s could not go on; trying again later", run_id)
        finally:
            lock.release()

    def advance(self, run_id: str) -> None:
        """Take every step of a run that is due."""
        self.run(run_id)
        with self._lock(run_id):
            while (action := self._next(run_id)) is not None:
                self._take(self._runs[run_id], action)

    def save_traffic(self) -> None:
        """Write down the meter's counts, so that little is lost if the server is killed."""
        unsaved = self._meter.take_dirty()
        try:
            for run_id in list(unsaved):
                if run_id in self._runs:
                    with self._store.writing() as session:
                        self._meter.save(session, run_id)
                unsaved.discard(run_id)
        finally:
            self._meter.mark_dirty(unsaved)

    def _take(self, run: RunSnapshot, action: rounds.Action) -> None:
        if isinstance(action, rounds.Redistill):
            self._renewals.start(run.id)
            return
        if isinstance(action, rounds.Aggregate):
            with self._store.reading() as session:
                action = transitions.average(session, run, action, self.files(run.id))
        with self._changing(run.id) as session:
            work = self._watcher.work(run.id)
            transitions.apply(session, run, action, self._meter, self._clock.wall(), work)
        log.info("run %s: %s", run.id, action)
        if not isinstance(action, rounds.OpenTraining):
            self._watcher.round_over(run.id)
            if self.run(run.id).status.over:
                self._watcher.run_over(run.id)
            self._sweep(run.id, run)

    def _pauses(self, run_id: str) -> bool:
        return self._clock.monotonic() < self._not_before.get(run_id, 0.0)

    def _next(self, run_id: str) -> rounds.Action | None:
        if self._renewals.is_running(run_id):
            return None
        live = self._presence.live(run_id)
        now = self._clock.monotonic()
        return rounds.decide(self._runs[run_id], live, now, settled=self._presence.settled)

    def _renew(self, run_id: str, check: Check) -> None:
        """Distil a run's proxy again; its next round waits for that."""
        run, files = self.run(run_id), self.files(run_id)

        def still_wanted() -> None:
            check()
            if self.run(run_id).status.over:
                raise Stopped

        if not run.distilled_round:
            return
        still_wanted()
        cache = self._data_dir / "backbones"
        made = prepare.redistill_run(run, files, cache, still_wanted)
        with self._changing(run_id) as session:
            still_wanted()
            backbone = relative_to_data_dir(made.backbone_path, self._data_dir)
            at = self._clock.wall()
            transitions.renew(session, run, backbone, made.head, run.closed_rounds, at)
        files.prune_redistilled(run.closed_rounds)
        log.info("run %s: its proxy was distilled again after round %d", run_id, run.closed_rounds)

    def _cannot_renew(self, run_id: str, error: SFPromptError) -> None:
        with self._changing(run_id) as session:
            if self.run(run_id).status.over:
                return
            reason = f"distillation after round {self.run(run_id).closed_rounds}: {error}"
            transitions.end_run(session, run_id, RunStatus.FAILED, reason, self._clock.wall())
        self._watcher.run_over(run_id)

    def is_known(self, once: IdempotentRequest) -> bool:
        """Whether a request of this key was answered before, whatever its content."""
        with self._store.reading() as session:
            return once.is_known(session)

    def _recall(self, once: IdempotentRequest) -> dict[str, Any] | None:
        with self._store.reading() as session:
            return once.recall(session)

    @contextmanager
    def _changing(self, run_id: str) -> Iterator[Session]:
        """One transaction on one run; what it has changed is seen only once it is on disk."""
        self.run(run_id)
        with self._lock(run_id):
            with self._store.writing() as session:
                yield session
            self._reload(run_id)
        self._watcher.changed(run_id)

    def _lock(self, run_id: str) -> threading.RLock:
        return self._locks.setdefault(run_id, threading.RLock())

    def _reload(self, run_id: str) -> None:
        with self._store.reading() as session:
            fresh = load_snapshot(session, run_id, self._data_dir)
        old = self._runs.get(run_id)
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
                deadline = self._clock.monotonic() + timeout
        self._runs[run_id] = replace(fresh, deadline=deadline)

    def _sweep(self, run_id: str, before: RunSnapshot) -> None:
        """Remove the tensors of updates whose round is over, and of held states long gone.

        Weights of updates stay on record. The state before this one may still be in somebody's
        hands: ``before`` is the run as it was.
        """
        run = self._runs[run_id]
        self.files(run_id).prune_server_states(one.held.sha256 for one in (before, run) if one.held)
        wanted: list[str] = []
        if run.open_round is not None and run.open_round.status == RoundStatus.TRAINING:
            with self._store.reading() as session:
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


def _member_of(run: RunSnapshot, participant: str) -> Member:
    member = run.members.get(participant)
    if member is None:
        raise NotFound("there is no such participant", field="participant", value=participant)
    return member
