"""The service behind the federation plane; a change is on disk before its response is sent."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sqlalchemy.orm import Session
from torch import Tensor

from protocol.errors import (
    Busy,
    Conflict,
    EmptyUpdate,
    InvalidField,
    NonFinite,
    NotFound,
    SFPromptError,
    WrongShape,
)
from protocol.frames import Frame
from protocol.messages import (
    Assignment,
    EvaluationReport,
    JoinRequest,
    JoinResponse,
    RoundStatus,
    RunStatus,
    RunView,
    Task,
    UpdateMeta,
    UpdateReceipt,
)
from protocol.settings import RunSettings
from split_model.checkpoints.state import applied
from split_server.federation import permissions, records, rounds, transitions, updates, views
from split_server.federation.advance import RunAdvancer
from split_server.federation.credentials import Credentials
from split_server.federation.liveness import Liveness
from split_server.federation.runs import RunRegistry, require_not_removed
from split_server.federation.snapshot import Participant, RunSnapshot, load_snapshot
from split_server.federation.waiting import waiting_in
from split_server.models.prepare import PreparedRun, prepare_run
from split_server.payloads.tensors import FLOAT32_BYTES, decode_update, require_finite
from split_server.storage.events import IdempotentRequest
from split_server.storage.run_files import RunFiles, relative_to_data_dir
from split_server.storage.run_ids import new_run_id
from split_server.storage.tensor_files import read_tensors

log = logging.getLogger(__name__)

_CREATE_WAIT_S = 5.0  # for another creation: a waiting request holds a thread

_UPDATE_MARGIN_BYTES = 1024 * 1024  # header and padding of an update's frame

Prepare = Callable[[RunSettings, RunFiles, Path], PreparedRun]


class TrainedStates(Protocol):
    """The tuned states of sessions that trained prompts or a body on the server."""

    def trained_state(self, run_id: str, participant_id: str, session: str) -> dict[str, Tensor]:
        """Return the tuned tensors of a finished session, by their names in a state.

        Raises:
            StepLost: the server no longer has the session, or it is not finished.
            NonFinite: a tensor is not finite.
        """


class FederationService:
    """Creates runs, and handles all requests that change them. Thread-safe.

    Args:
        runs: the registry of all runs.
        advancer: does the steps of runs that become due.
        credentials: issues the participants' credentials.
        liveness: tracks participants with a recent request.
        trained: returns the part of an update that was trained on the server.
        prepare: creates the model files of a new run.
    """

    def __init__(
        self,
        runs: RunRegistry,
        advancer: RunAdvancer,
        credentials: Credentials,
        liveness: Liveness,
        trained: TrainedStates,
        prepare: Prepare = prepare_run,
    ) -> None:
        self._runs = runs
        self._advancer = advancer
        self._credentials = credentials
        self._liveness = liveness
        self._trained = trained
        self._prepare = prepare
        self._creating = threading.Lock()

    # Tasks

    def assignment(self, run_id: str, participant_id: str) -> Assignment:
        """Return a participant's next task, from memory alone.

        Raises:
            NotFound: there is no such run or participant.
            Removed: the operator removed the participant.
        """
        run = self._runs.snapshot(run_id)
        if participant_id not in run.participants:
            raise NotFound(
                "there is no such participant", field="participant", value=participant_id
            )
        require_not_removed(run.participants[participant_id])
        assignment = rounds.assignment_for(run, participant_id, self._runs.clock.monotonic())
        if assignment.task is not Task.WAIT:
            return assignment
        return assignment.model_copy(update={"waiting": waiting_in(run, self._liveness)})

    # Requests that create and cancel runs

    def create(self, settings: RunSettings, idempotent: IdempotentRequest) -> RunView:
        """Create the model files of a run, and then the run.

        Raises:
            InvalidField: the model cannot be downloaded, or cut as the plan requires.
            Busy: another run is being created, perhaps this one; repeat with the same key.
        """
        if not self._creating.acquire(timeout=_CREATE_WAIT_S):
            raise Busy("another run is being created", retry_after_s=_CREATE_WAIT_S)
        try:  # one at a time, so that a repetition finds the first response
            if (response := self._runs.recall(idempotent)) is not None:
                return RunView.model_validate(response)
            run_id = new_run_id()
            files = self._runs.files(run_id)
            try:
                view = self._create(run_id, settings, files, idempotent)
            except BaseException:
                files.remove()
                raise
        finally:
            self._creating.release()
        self._runs.watcher.changed(run_id)
        log.info("run %s (%s) created", run_id, settings.name)
        return view

    def _create(
        self, run_id: str, settings: RunSettings, files: RunFiles, idempotent: IdempotentRequest
    ) -> RunView:
        runs = self._runs
        prepared = self._prepare(settings, files, runs.cache_dir)
        at = runs.clock.wall()
        with runs.store.writing() as session:
            backbone_path = relative_to_data_dir(prepared.backbone_path, runs.data_dir)
            records.add_run(session, run_id, settings, prepared, backbone_path, at)
            view = views.run_view(load_snapshot(session, run_id, runs.data_dir))
            idempotent.remember(session, view.model_dump(mode="json"), at)
        runs.reload(run_id)
        return view

    def cancel(self, run_id: str, idempotent: IdempotentRequest) -> RunView:
        """Stop a run; its participants get ``stop`` with their next request.

        Raises:
            NotFound: there is no such run.
            RunClosed: the run is over.
        """
        runs = self._runs
        with runs.changing(run_id) as session:
            if (response := idempotent.recall(session)) is not None:
                return RunView.model_validate(response)
            run = runs.snapshot(run_id)
            permissions.require_running(run)
            at = runs.clock.wall()
            transitions.abandon_round(session, run, runs.meter, at)
            transitions.end_run(
                session, run_id, RunStatus.CANCELLED, "cancelled by its operator", at
            )
            view = views.run_view(load_snapshot(session, run_id, runs.data_dir))
            idempotent.remember(session, view.model_dump(mode="json"), at)
        runs.watcher.round_over(run_id)
        runs.watcher.run_over(run_id)
        with runs.lock(run_id):
            runs.sweep(run_id, run)
        return view

    # Requests that join and leave

    def join(
        self, run_id: str, request: JoinRequest, idempotent: IdempotentRequest
    ) -> JoinResponse:
        """Add a device to a run; a repetition returns the same participant.

        Raises:
            NotFound: there is no such run.
            RunClosed: the run is over, and the device has samples.
            Removed: the operator removed the participant that joined with this key.
            InvalidField: the classes of the device's data do not fit the run.
        """
        with self._runs.changing(run_id) as session:
            if (earlier := idempotent.stored(session)) is not None:
                known = self._runs.snapshot(run_id).participants
                require_not_removed(known[str(earlier["participant"])])
            response = idempotent.recall(session)
            participant_id = str(response["participant"]) if response else None
            if participant_id is None:
                run = self._runs.snapshot(run_id)
                participant_id = self._join(session, run, request, idempotent)
        self._liveness.touch(run_id, participant_id)
        self._advancer.try_advance(run_id)
        return JoinResponse(
            participant=participant_id,
            credential=self._credentials.issue(run_id, participant_id),
            run=views.run_view(self._runs.snapshot(run_id)),
        )

    def _join(
        self,
        session: Session,
        run: RunSnapshot,
        request: JoinRequest,
        idempotent: IdempotentRequest,
    ) -> str:
        updates.check_join(request, run.plan.federation.max_samples)
        if request.train_samples or request.test_samples:
            permissions.require_running(
                run
            )  # a device without data only reads, which is allowed later
            updates.check_name(run, request, self._liveness.live(run.id))
        updates.check_classes(run, request)
        updates.check_consent(run, request)
        return records.add_participant(session, run, request, idempotent, self._runs.clock.wall())

    def leave(self, run_id: str, participant_id: str, idempotent: IdempotentRequest) -> None:
        """Remove a participant from its run, so that no round waits for it.

        Raises:
            NotFound: there is no such run or participant.
            Forbidden: the participant has already left.
        """
        runs = self._runs
        with runs.changing(run_id) as session:
            if idempotent.recall(session) is not None:
                return
            runs.participant(run_id, participant_id)
            at = runs.clock.wall()
            records.record_leaving(session, run_id, participant_id, idempotent, at)
        self._liveness.forget(run_id, participant_id)
        runs.drop_labels(run_id, participant_id)
        runs.watcher.left(run_id, participant_id)
        self._advancer.try_advance(run_id)

    def end(self, run_id: str, participant_id: str, reason: str) -> None:
        """Record that a participant ends: no round waits for it until its next request."""
        run, _ = self._runs.participant(run_id, participant_id)
        if run.status.is_over or not self._liveness.end(run_id, participant_id):
            return
        with self._runs.changing(run_id) as session:
            at = self._runs.clock.wall()
            records.record_end(session, run_id, participant_id, reason, at)
        self._advancer.try_advance(run_id)

    # Updates

    def admit_update(self, run_id: str, participant_id: str, idempotent: IdempotentRequest) -> int:
        """Refuse an update that cannot count, before its body is received; admit a repetition.

        Returns:
            The limit of its body in bytes: the state in the widest codec, and the method's further
            tensors of this round.

        Raises:
            NotFound: there is no such run or participant.
            Forbidden: the participant has left.
            StaleRound: the open round, if any, expects no update of this participant.
            RunClosed: the run is over.
        """
        run, participant = self._runs.participant(run_id, participant_id)
        permissions.require_own_labels(run)
        try:
            permissions.require_any_trainer(run, participant)
        except Conflict:
            if not self._runs.is_known(idempotent):
                raise
        shapes = run.method.extra_shapes(run.plan, run.round).values()
        extra_bytes = FLOAT32_BYTES * sum(map(math.prod, shapes))
        return run.state.device.nbytes + _UPDATE_MARGIN_BYTES + extra_bytes

    def update(
        self,
        run_id: str,
        participant_id: str,
        meta: UpdateMeta,
        frame: Frame,
        idempotent: IdempotentRequest,
    ) -> UpdateReceipt:
        """Count an update once.

        Args:
            run_id: the run.
            participant_id: the sender.
            meta: meta part of the update.
            frame: frame of the update.
            idempotent: idempotency key and content of the request.

        Raises:
            StepLost: the server no longer has its part of the update.
            StaleRound, RunClosed, Conflict: the round is not open, or has counted another update.
            EmptyUpdate, NonFinite, WrongShape: the update is declined, and the round continues
                without it.
            InvalidField: a field is wrong; the participant may send a corrected update.
        """
        self._advancer.try_advance(run_id)
        with self._runs.lock(run_id):
            refusal = self._receive(run_id, participant_id, meta, frame, idempotent)
        self._advancer.try_advance(run_id)
        self._settle(run_id, participant_id, meta)
        if refusal is not None:
            raise refusal
        return UpdateReceipt(round=meta.round, samples=meta.samples)

    def _receive(
        self,
        run_id: str,
        participant_id: str,
        meta: UpdateMeta,
        frame: Frame,
        idempotent: IdempotentRequest,
    ) -> SFPromptError | None:
        """Count an update, or decline it permanently; return the reason for declining it."""
        if self._runs.recall(idempotent) is not None:
            return None
        run, participant = self._runs.participant(run_id, participant_id)
        open_round = permissions.require_trainer(run, participant, meta.round, meta.attempt)
        permissions.require_first(open_round.updated, participant_id, "update")
        try:
            tensors = self._complete_update(run, participant, meta, frame)
        except (EmptyUpdate, NonFinite, WrongShape) as error:
            self._decline(run, participant, error)
            return error
        sha256 = self._runs.files(run_id).write_update(tensors).sha256
        at = self._runs.clock.wall()
        with self._runs.changing(run_id) as session:
            records.count_update(session, run_id, participant_id, meta, sha256, idempotent, at)
        return None

    def _complete_update(
        self, run: RunSnapshot, participant: Participant, meta: UpdateMeta, frame: Frame
    ) -> dict[str, Tensor]:
        """Decode and check an update, and add the part that was trained on the server."""
        updates.check_samples(meta, participant)
        updates.check_base(meta, run.state.device)
        extras = run.method.decode_extras(run.plan, meta.round, frame)
        tensors = decode_update(frame, run.plan.model, extras)
        if meta.base is not None:
            base = read_tensors(self._runs.files(run.id).state(meta.base))
            tensors = applied(base, tensors)
            require_finite(tensors)
        if run.state.server is not None:
            tensors |= self._trained_tensors(run, participant, meta)
        return tensors | extras

    def _trained_tensors(
        self, run: RunSnapshot, participant: Participant, meta: UpdateMeta
    ) -> dict[str, Tensor]:
        if meta.round == 0 and run.state.server is not None:  # round 0 tunes no prompts
            return read_tensors(self._runs.files(run.id).server_state(run.state.server.sha256))
        if meta.session is None:
            raise InvalidField(
                "an update must name the session that trained its prompts or body", field="session"
            )
        return self._trained.trained_state(run.id, participant.id, meta.session)

    def _decline(self, run: RunSnapshot, participant: Participant, error: SFPromptError) -> None:
        if run.open_round is None or participant.id in run.open_round.declined:
            return
        with self._runs.changing(run.id) as session:
            at = self._runs.clock.wall()
            records.decline_update(session, run.id, run.open_round, participant.id, error, at)
        self._runs.refusals[run.id] += 1

    def _settle(self, run_id: str, participant_id: str, meta: UpdateMeta) -> None:
        """Release the participant's tuned body, unless the update belongs to an earlier attempt."""
        run = self._runs.snapshot(run_id)
        if not run.method.has_tuned_bodies(run.plan) or run.open_round is None:
            return
        if (run.open_round.round, run.open_round.attempt) == (meta.round, meta.attempt):
            self._runs.watcher.update_settled(run_id, participant_id)

    def evaluation(
        self,
        run_id: str,
        participant_id: str,
        report: EvaluationReport,
        idempotent: IdempotentRequest,
    ) -> None:
        """Count a participant's evaluation of the new global state once.

        Raises:
            StaleRound, RunClosed, Conflict: the round is not open, or has counted another
                evaluation.
            InvalidField: a number is impossible for this participant.
        """
        self._advancer.try_advance(run_id)
        with self._runs.changing(run_id) as session:
            if idempotent.recall(session) is not None:
                return
            run, participant = self._runs.participant(run_id, participant_id)
            open_round = permissions.require_phase(
                run, report.round, report.attempt, RoundStatus.EVALUATING
            )
            permissions.require_evaluator(open_round, participant_id)
            permissions.require_first(open_round.evaluated, participant_id, "evaluation")
            updates.check_report(report, participant, run.plan.model.num_classes)
            at = self._runs.clock.wall()
            records.count_evaluation(session, run_id, participant_id, report, idempotent, at)
        self._advancer.try_advance(run_id)
