"""What the operator does with an open run: pause it, resume it, close its round early."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.orm import Session

from protocol.errors import Conflict
from protocol.messages import RoundStatus, RunView
from split_server.federation import permissions, views
from split_server.federation.advance import RunAdvancer
from split_server.federation.rounds import is_unmeasured
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import OpenRound, RunSnapshot, load_snapshot
from split_server.storage.database import RoundRow, RunRow
from split_server.storage.events import IdempotentRequest, record_event

log = logging.getLogger(__name__)

Change = Callable[[Session, RunSnapshot, float], None]


@dataclass(frozen=True)
class RunControl:
    """Controls open runs; each change is on disk before it has an effect. Thread-safe."""

    runs: RunRegistry
    advancer: RunAdvancer

    def pause(self, run_id: str, idempotent: IdempotentRequest) -> RunView:
        """Let the open round end, and open no further one.

        Raises:
            NotFound: there is no such run.
            RunClosed: the run is over.
        """
        return self._change(run_id, idempotent, _pause)

    def resume(self, run_id: str, idempotent: IdempotentRequest) -> RunView:
        """Let a paused run go on.

        Raises:
            NotFound: there is no such run.
            RunClosed: the run is over.
        """
        return self._change(run_id, idempotent, _resume)

    def close_round(self, run_id: str, idempotent: IdempotentRequest) -> RunView:
        """End the open phase of a round now, without the devices that are missing.

        Raises:
            NotFound: there is no such run.
            RunClosed: the run is over.
            Conflict: no round is open, or too few devices have answered.
        """
        return self._change(run_id, idempotent, _close_round)

    def _change(self, run_id: str, idempotent: IdempotentRequest, change: Change) -> RunView:
        runs = self.runs
        with runs.changing(run_id) as session:
            if (response := idempotent.recall(session)) is not None:
                return RunView.model_validate(response)
            run = runs.snapshot(run_id)
            permissions.require_running(run)
            at = runs.clock.wall()
            change(session, run, at)
            session.flush()
            view = views.run_view(load_snapshot(session, run_id, runs.data_dir))
            idempotent.remember(session, view.model_dump(mode="json"), at)
        log.info("run %s: %s", run_id, change.__name__.strip("_"))
        self.advancer.try_advance(run_id)
        return view


def _pause(session: Session, run: RunSnapshot, at: float) -> None:
    if not run.paused:
        session.get_one(RunRow, run.id).paused = True
        record_event(session, run.id, at, "run_paused")


def _resume(session: Session, run: RunSnapshot, at: float) -> None:
    if run.paused:
        session.get_one(RunRow, run.id).paused = False
        record_event(session, run.id, at, "run_resumed")


def _close_round(session: Session, run: RunSnapshot, at: float) -> None:
    open_round = run.open_round
    if open_round is None:
        raise Conflict("no round of the run is open", field="run", value=run.id)
    _require_closable(run, open_round)
    row = session.get_one(RoundRow, (run.id, open_round.round, open_round.attempt))
    if row.closing:
        return
    row.closing = True
    phase = str(open_round.status)
    record_event(session, run.id, at, "round_closing", round=open_round.round, phase=phase)


def _require_closable(run: RunSnapshot, open_round: OpenRound) -> None:
    needed = run.plan.federation.min_updates
    if open_round.status == RoundStatus.TRAINING and len(open_round.updated) < needed:
        raise Conflict(
            "the round has too few updates to be closed",
            field="updates",
            limit=needed,
            value=len(open_round.updated),
            hint="wait for another device, or cancel the run",
        )
    if is_unmeasured(run, open_round):
        raise Conflict(
            "the last round ends with an evaluation, and no device has sent one",
            field="evaluations",
            limit=1,
            value=0,
            hint="wait for one device, or cancel the run",
        )
