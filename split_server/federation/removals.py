"""What the operator takes away: a participant from its run, or a whole run."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from protocol.errors import Conflict, NotFound
from split_server.federation import records
from split_server.federation.advance import RunAdvancer
from split_server.federation.liveness import Liveness
from split_server.federation.runs import RunRegistry
from split_server.storage.events import IdempotentRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removals:
    """Removes participants and runs. Thread-safe."""

    runs: RunRegistry
    advancer: RunAdvancer
    liveness: Liveness

    def remove_participant(
        self, run_id: str, participant_id: str, idempotent: IdempotentRequest
    ) -> None:
        """Revoke a participant's credential; the run goes on without it.

        Its cached samples and its open work are dropped, and an update that has not been averaged
        yet does not count.

        Raises:
            NotFound: there is no such run or participant.
        """
        runs = self.runs
        with runs.changing(run_id) as session:
            if idempotent.recall(session) is not None:
                return
            run = runs.snapshot(run_id)
            if participant_id not in run.participants:
                raise NotFound(
                    "there is no such participant", field="participant", value=participant_id
                )
            records.record_removal(session, run, participant_id, idempotent, runs.clock.wall())
        log.info("run %s: participant %s was removed", run_id, participant_id)
        self.liveness.forget(run_id, participant_id)
        runs.drop_labels(run_id, participant_id)
        runs.watcher.left(run_id, participant_id)
        self.advancer.try_advance(run_id)

    def delete_run(self, run_id: str, idempotent: IdempotentRequest) -> None:
        """Delete the rows and the files of a run that is over.

        Raises:
            NotFound: there is no such run.
            Conflict: it is not over.
        """
        runs = self.runs
        if runs.recall(idempotent) is not None:
            return
        runs.snapshot(run_id)
        with runs.lock(run_id):
            run = runs.snapshot(run_id)
            if not run.status.is_over:
                raise Conflict(
                    "only a run that is over can be deleted",
                    field="run",
                    limit=["finished", "cancelled", "failed"],
                    value=str(run.status),
                    hint=f"stop it first: split-server cancel {run_id}",
                )
            with runs.store.writing() as session:
                records.delete_run(session, run_id)
                idempotent.remember(session, {}, runs.clock.wall())
            runs.forget(run_id)
        self.liveness.forget(run_id)
        runs.watcher.run_over(run_id)
        runs.watcher.changed(run_id)
        runs.files(run_id).remove()  # after the rows: the next start removes what a crash leaves
        log.info("run %s was deleted", run_id)
