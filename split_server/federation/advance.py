"""Advance runs: do the steps that `rounds.decide` returns, and rebuild models between rounds."""

from __future__ import annotations

import logging
from pathlib import Path

from protocol.errors import SFPromptError
from protocol.messages import RoundStatus, RunStatus
from split_server.federation import rounds, transitions
from split_server.federation.background import Check, RebuildJobs, Stopped
from split_server.federation.liveness import Liveness
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import RunSnapshot
from split_server.method import Rebuild
from split_server.storage.run_files import relative_to_data_dir

log = logging.getLogger(__name__)

_RETRY_S = 5.0  # pause after a failed step, e.g. because the disk is full


class RunAdvancer:
    """Does the due steps of runs. Thread-safe.

    Args:
        runs: the registry of all runs.
        liveness: tracks participants with a recent request.
    """

    def __init__(self, runs: RunRegistry, liveness: Liveness) -> None:
        self._runs = runs
        self._liveness = liveness
        self._not_before: dict[str, float] = {}  # end of the pause after a failed step, by run
        self._rebuilds = RebuildJobs(self._rebuild, self._fail)

    def close(self) -> None:
        """Stop rebuilding models; the next start of the server resumes it."""
        self._rebuilds.close()

    def is_due(self, run_id: str) -> bool:
        """Whether a step of the run is due. Fast, and without a lock."""
        return not self._is_paused(run_id) and self._next(run_id) is not None

    def try_advance(self, run_id: str, *, wait: bool = True) -> None:
        """Advance a run as far as possible, on behalf of a request that does not depend on it.

        If a step fails, the error is logged, and the run pauses for a few seconds.

        Args:
            run_id: the run.
            wait: whether to wait if another thread is changing the run. A long poll, which is
                notified of changes, passes False so that it does not block a thread.
        """
        self._runs.snapshot(run_id)
        lock = self._runs.lock(run_id)
        if not lock.acquire(blocking=wait):
            return
        try:
            if not self._is_paused(run_id):
                self.advance(run_id)
                self._not_before.pop(run_id, None)
        except Exception:
            self._not_before[run_id] = self._runs.clock.monotonic() + _RETRY_S
            log.exception("run %s: a step failed; retrying in %g s", run_id, _RETRY_S)
        finally:
            lock.release()

    def advance(self, run_id: str) -> None:
        """Do all due steps of a run.

        Raises:
            NotFound: there is no such run.
        """
        self._runs.snapshot(run_id)
        with self._runs.lock(run_id):
            while (action := self._next(run_id)) is not None:
                self._take(self._runs.snapshot(run_id), action)

    def _take(self, run: RunSnapshot, action: rounds.Action) -> None:
        runs = self._runs
        if isinstance(action, rounds.Rebuild):
            self._rebuilds.start(run.id)
            return
        if isinstance(action, rounds.Aggregate):
            with runs.store.reading() as session:
                action = transitions.average(session, run, action, runs.files(run.id))
        with runs.changing(run.id) as session:
            work = runs.watcher.work(run.id)
            transitions.apply(session, run, action, runs.meter, runs.clock.wall(), work)
        if isinstance(action, rounds.Publish):
            runs.refusals[run.id] += len(action.refused)
        self._note_attendance(run, action)
        log.info("run %s: %s", run.id, action)
        if not isinstance(action, rounds.OpenTraining):
            runs.watcher.round_over(run.id)
            if runs.snapshot(run.id).status.is_over:
                runs.watcher.run_over(run.id)
            runs.sweep(run.id, run)

    def _note_attendance(self, run: RunSnapshot, action: rounds.Action) -> None:
        """Note who answered in the phase that an action ends, and who did not."""
        if isinstance(action, rounds.OpenTraining):
            self._liveness.opened(run.id)
        elif run.open_round is not None:
            is_training = run.open_round.status == RoundStatus.TRAINING
            pending = rounds.pending_trainers if is_training else rounds.pending_evaluators
            answered = run.open_round.updated | run.open_round.declined if is_training else ()
            self._liveness.closed(run.id, answered, pending(run, run.open_round))

    def _is_paused(self, run_id: str) -> bool:
        return self._runs.clock.monotonic() < self._not_before.get(run_id, 0.0)

    def _next(self, run_id: str) -> rounds.Action | None:
        if self._rebuilds.is_running(run_id):
            return None
        now = self._runs.clock.monotonic()
        run = self._runs.snapshot(run_id)
        if run.plan.shares_labels:  # the server does the tasks: it matters who has sent its labels
            away = run.participants.keys() - run.labelled
            return rounds.decide(run, run.labelled, now, settled=True, away=away)
        live = self._liveness.live(run_id)
        return rounds.decide(
            run,
            live,
            now,
            settled=self._liveness.is_settled(run_id, (each.id for each in run.present)),
            away=self._liveness.away(run_id),
            pausing=self._liveness.pausing(run_id),
        )

    def _rebuild(self, run_id: str, check: Check) -> None:
        """Let the run's method rebuild its model; the next round waits for this."""
        runs, run, files = self._runs, self._runs.snapshot(run_id), self._runs.files(run_id)

        def check_wanted() -> None:
            check()
            if runs.snapshot(run_id).status.is_over:
                raise Stopped

        if not run.needs_rebuild:
            return
        check_wanted()
        round_ = run.closed_rounds
        log.info("run %s: rebuilding its model after round %d", run_id, round_)
        work = Rebuild(
            plan=run.plan,
            files=files,
            cache_dir=runs.cache_dir,
            round=round_,
            state=run.state,
            weights=Path(run.backbone_path),
            check=check_wanted,
        )
        model = run.method.rebuild(work)
        with runs.changing(run_id) as session:
            check_wanted()
            weights = relative_to_data_dir(model.weights, runs.data_dir)
            at = runs.clock.wall()
            transitions.replace_model(session, run, weights, model.head, round_, at)
        files.prune_rebuilt(round_)
        log.info("run %s: its model was rebuilt after round %d", run_id, round_)

    def _fail(self, run_id: str, error: SFPromptError) -> None:
        """End a run whose model cannot be rebuilt."""
        runs = self._runs
        with runs.changing(run_id) as session:
            if runs.snapshot(run_id).status.is_over:
                return
            reason = (
                f"rebuilding the model after round {runs.snapshot(run_id).closed_rounds}: {error}"
            )
            transitions.end_run(session, run_id, RunStatus.FAILED, reason, runs.clock.wall())
        runs.watcher.run_over(run_id)
