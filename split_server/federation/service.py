"""The federation plane: what can be done with runs, each step on disk before it is answered."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session
from torch import Tensor

from protocol.errors import (
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
    Event,
    JoinRequest,
    JoinResponse,
    Results,
    RoundStatus,
    RunStatus,
    RunView,
    UpdateMeta,
    UpdateReceipt,
)
from protocol.plan import RunPlan
from split_model import applied
from split_server.federation import rounds, transitions, views
from split_server.federation.credentials import Credentials
from split_server.federation.liveness import Liveness
from split_server.federation.runs import Runs, Watcher
from split_server.federation.snapshot import Member, RunSnapshot, load_snapshot
from split_server.federation.updates import check_report, check_samples, read_neurons, require_base
from split_server.models.prepare import PreparedRun, prepare_run
from split_server.payloads.tensors import read_update, require_finite
from split_server.runtime.process import Clock
from split_server.storage.data_dir import new_run_id
from split_server.storage.database import (
    EvaluationRow,
    ParticipantRow,
    RoundRow,
    RunRow,
    Store,
    UpdateRow,
)
from split_server.storage.events import IdempotentRequest, record_event
from split_server.storage.run_files import RunFiles, read_tensors, relative_to_data_dir
from split_server.storage.traffic import Meter

log = logging.getLogger(__name__)

Held = Callable[[], dict[str, Tensor]]

Prepare = Callable[[RunPlan, RunFiles, Path], PreparedRun]


class FederationService(Runs):
    """What can be asked of the runs. Methods may be called from many threads at once.

    Args:
        data_dir: where the runs' files and the backbones lie.
        store: the database.
        credentials: issues what participants show.
        meter: the bytes of the participants.
        presence: who has been heard of lately.
        watcher: is told of changes.
        clock: the two times.
        prepare: makes the model's files of a new run.
    """

    def __init__(
        self,
        data_dir: Path,
        store: Store,
        credentials: Credentials,
        meter: Meter,
        presence: Liveness,
        watcher: Watcher,
        clock: Clock | None = None,
        prepare: Prepare = prepare_run,
    ) -> None:
        super().__init__(data_dir, store, meter, presence, watcher, clock or Clock())
        self._credentials = credentials
        self._prepare = prepare
        self._creating = threading.Lock()

    # Reading

    def views(self) -> list[RunView]:
        """All runs, the oldest first."""
        every = sorted(self._runs.values(), key=lambda run: (run.created_at, run.id))
        return [views.run_view(run) for run in every]

    def results(self, run_id: str) -> Results:
        self.run(run_id)
        with self._lock(run_id), self._store.reading() as session:
            return views.results(session, self.run(run_id), self._meter)

    def events(self, run_id: str, after: int) -> list[Event]:
        self.run(run_id)
        with self._store.reading() as session:
            return views.events(session, run_id, after)

    def assignment(self, run_id: str, participant: str) -> Assignment:
        """What a participant is to do next; computed from memory, so it may be asked often."""
        snapshot = self.run(run_id)
        if participant not in snapshot.members:
            raise NotFound("there is no such participant", field="participant", value=participant)
        return rounds.assignment_for(snapshot, participant, self._clock.monotonic())

    # Changing

    def create(self, settings: RunPlan, once: IdempotentRequest) -> RunView:
        """Make a run: its model's files first, then the run itself."""
        with self._creating:  # one at a time: a repeat must find the first one's answer
            if (known := self._recall(once)) is not None:
                return RunView.model_validate(known)
            run_id = new_run_id()
            files = self.files(run_id)
            try:
                view = self._create(run_id, settings, files, once)
            except BaseException:
                files.remove()
                raise
        self._watcher.changed(run_id)
        log.info("run %s (%s) created", run_id, settings.name)
        return view

    def _create(
        self, run_id: str, settings: RunPlan, files: RunFiles, once: IdempotentRequest
    ) -> RunView:
        prepared = self._prepare(settings, files, self._data_dir / "backbones")
        at = self._clock.wall()
        with self._store.writing() as session:
            row = RunRow(
                id=run_id,
                status=RunStatus.WAITING,
                reason=None,
                settings=settings.model_dump(mode="json"),
                created_at=at,
                finished_at=None,
                backbone_path=relative_to_data_dir(prepared.backbone_path, self._data_dir),
                backbone_bytes=prepared.backbone_bytes,
                renewed=0,
                head_sha256=prepared.head.sha256,
                head_nbytes=prepared.head.nbytes,
            )
            row.set_state(prepared.state)
            session.add(row)
            record_event(session, run_id, at, "run_created", name=settings.name)
            view = views.run_view(load_snapshot(session, run_id, self._data_dir))
            once.remember(session, view.model_dump(mode="json"), at)
        self._reload(run_id)
        return view

    def cancel(self, run_id: str, once: IdempotentRequest) -> RunView:
        """Stop a run; its participants are told at their next call.

        Raises:
            NotFound, RunClosed
        """
        with self._changing(run_id) as session:
            if (known := once.recall(session)) is not None:
                return RunView.model_validate(known)
            run = self.run(run_id)
            rounds.require_running(run)
            at = self._clock.wall()
            transitions.abandon_round(session, run, self._meter, at)
            transitions.end_run(
                session, run_id, RunStatus.CANCELLED, "cancelled by its operator", at
            )
            view = views.run_view(load_snapshot(session, run_id, self._data_dir))
            once.remember(session, view.model_dump(mode="json"), at)
        self._watcher.round_over(run_id)
        self._watcher.run_over(run_id)
        with self._lock(run_id):
            self._sweep(run_id, run)
        return view

    def join(self, run_id: str, request: JoinRequest, once: IdempotentRequest) -> JoinResponse:
        """Take a device into a run; a repeat gets the same participant again.

        Raises:
            NotFound, RunClosed
            InvalidField: the device's data have another number of classes than the run.
        """
        with self._changing(run_id) as session:
            known = once.recall(session)
            participant = str(known["participant"]) if known else None
            if participant is None:
                participant = self._join(session, self.run(run_id), request, once)
        self._presence.touch(run_id, participant)
        self.go_on(run_id)
        return JoinResponse(
            participant=participant,
            credential=self._credentials.issue(run_id, participant),
            run=views.run_view(self.run(run_id)),
        )

    def _join(
        self, session: Session, run: RunSnapshot, request: JoinRequest, once: IdempotentRequest
    ) -> str:
        if request.train_samples or request.test_samples:
            rounds.require_running(run)  # one without data only looks, and may always
        if request.num_classes != run.plan.model.num_classes:
            raise InvalidField(
                "the device's data have another number of classes than the run",
                field="num_classes",
                limit=run.plan.model.num_classes,
                value=request.num_classes,
                hint="a device that lacks a class needs class_names in the run's settings",
            )
        _require_same_classes(run, request)
        ordinal = len(run.members) + 1
        participant = f"p{ordinal:04d}"
        at = self._clock.wall()
        session.add(
            ParticipantRow(
                run_id=run.id,
                id=participant,
                ordinal=ordinal,
                name=request.name,
                train_samples=request.train_samples,
                test_samples=request.test_samples,
                classes_sha256=request.classes_sha256,
                joined_at=at,
                left_at=None,
                traffic={},
            )
        )
        once.remember(session, {"participant": participant}, at)
        record_event(
            session, run.id, at, "participant_joined", participant=participant, name=request.name
        )
        return participant

    def leave(self, run_id: str, participant: str, once: IdempotentRequest) -> None:
        """Let a participant go; a round does not wait for it any more."""
        with self._changing(run_id) as session:
            if once.recall(session) is not None:
                return
            self.member(run_id, participant)
            at = self._clock.wall()
            session.get_one(ParticipantRow, (run_id, participant)).left_at = at
            once.remember(session, {}, at)
            record_event(session, run_id, at, "participant_left", participant=participant)
        self._presence.forget(run_id, participant)
        self._watcher.left(run_id, participant)
        self.go_on(run_id)

    def update(
        self,
        run_id: str,
        participant: str,
        meta: UpdateMeta,
        frame: Frame,
        once: IdempotentRequest,
        held: Held | None = None,
    ) -> UpdateReceipt:
        """Count an update, once.

        Args:
            run_id, participant: whose it is.
            meta, frame: as the device sent them.
            once: the request.
            held: gives the part of the update that the server has already, where it has one.

        Raises:
            StepLost: that part is not here any more.
            StaleRound, RunClosed, Conflict: not now, or not again.
            EmptyUpdate, NonFinite, WrongShape: not like this; the round goes on without it.
            InvalidField: a field is wrong; the participant may correct it.
        """
        self.go_on(run_id)
        receipt = UpdateReceipt(round=meta.round, samples=meta.samples)
        with self._lock(run_id):
            if self._recall(once) is not None:
                return receipt
            run, member = self.member(run_id, participant)
            open_round = rounds.require_trainer(run, member, meta.round, meta.attempt)
            rounds.require_first(open_round.updated, participant, "update")
            try:
                check_samples(meta, member)
                require_base(meta, run.state)
                neurons = read_neurons(frame, run.plan, meta.round)
                tensors = read_update(frame, run.plan.model, neurons)
                if meta.base is not None:
                    tensors = applied(read_tensors(self.files(run_id).state(meta.base)), tensors)
                    require_finite(tensors)
                if held is not None:
                    tensors |= held()
                tensors |= neurons
            except (EmptyUpdate, NonFinite, WrongShape) as error:
                self._decline(run, member, error)
                refusal: SFPromptError | None = error
            else:
                refusal = None
                sha256 = self.files(run_id).write_update(tensors).sha256
                self._count(run, member, meta, sha256, once)
        self.go_on(run_id)
        if refusal is not None:
            raise refusal
        return receipt

    def _count(
        self,
        run: RunSnapshot,
        member: Member,
        meta: UpdateMeta,
        sha256: str,
        once: IdempotentRequest,
    ) -> None:
        at = self._clock.wall()
        with self._changing(run.id) as session:
            session.add(
                UpdateRow(
                    run_id=run.id,
                    round=meta.round,
                    attempt=meta.attempt,
                    participant_id=member.id,
                    samples=meta.samples,
                    received_at=at,
                    train_loss=meta.train_loss,
                    local_loss=meta.local_loss,
                    sha256=sha256,
                )
            )
            once.remember(session, {}, at)
            data = meta.model_dump(exclude={"local_loss", "session", "base"})
            record_event(session, run.id, at, "update_counted", participant=member.id, **data)

    def _decline(self, run: RunSnapshot, member: Member, error: SFPromptError) -> None:
        """Remember that this participant has nothing to count, so that nobody waits for it."""
        if run.open_round is None or member.id in run.open_round.declined:
            return
        key = (run.id, run.open_round.round, run.open_round.attempt)
        with self._changing(run.id) as session:
            row = session.get_one(RoundRow, key)
            row.declined = [*row.declined, member.id]
            record_event(
                session,
                run.id,
                self._clock.wall(),
                "update_refused",
                round=row.round,
                attempt=row.attempt,
                participant=member.id,
                code=error.code,
            )

    def evaluation(
        self, run_id: str, participant: str, report: EvaluationReport, once: IdempotentRequest
    ) -> None:
        """Take one participant's measurement of the new global state, once.

        Raises:
            StaleRound, RunClosed, Conflict: not now, or not again.
            InvalidField: a count that this participant cannot have.
        """
        self.go_on(run_id)
        with self._changing(run_id) as session:
            if once.recall(session) is not None:
                return
            run, member = self.member(run_id, participant)
            open_round = rounds.require_phase(
                run, report.round, report.attempt, RoundStatus.EVALUATING
            )
            rounds.require_evaluator(open_round, participant)
            rounds.require_first(open_round.evaluated, participant, "evaluation")
            check_report(report, member)
            at = self._clock.wall()
            session.add(
                EvaluationRow(
                    run_id=run_id,
                    participant_id=participant,
                    received_at=at,
                    **report.model_dump(),
                )
            )
            once.remember(session, {}, at)
            data: dict[str, Any] = report.model_dump(exclude={"loss_sum"})
            record_event(session, run_id, at, "evaluation_counted", participant=participant, **data)
        self.go_on(run_id)


def _require_same_classes(run: RunSnapshot, request: JoinRequest) -> None:
    """Labels are numbers: to devices whose classes differ they would mean different things."""
    known = {member.classes_sha256 for member in run.members.values()} - {None}
    if request.classes_sha256 is not None and known - {request.classes_sha256}:
        raise InvalidField(
            "the classes of this device's data have other names than those of the devices before",
            field="classes_sha256",
            limit=sorted(filter(None, known)),
            value=request.classes_sha256,
            hint="name its folders alike, or list class_names in the run's settings",
        )
