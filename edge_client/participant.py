"""A device's participation in a run: join, then do assignments until the run is over."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.data.dataset import Dataset, hash_names
from edge_client.data.errors import CorruptImageError, DataError
from edge_client.method import device_method
from edge_client.model import Compute, Model, needs_torch
from edge_client.policy import DevicePolicy
from edge_client.reporter import Reporter
from edge_client.run_model import RunModel
from edge_client.run_samples import RunSamples, open_samples, split_validation
from edge_client.smashed.sharing import share_labels
from edge_client.storage.blob_cache import BlobCache
from edge_client.storage.run_memory import RunMemory
from edge_client.training import Diverged, Evaluation, RoundContext, evaluate
from edge_client.transport.client import Server
from protocol.errors import (
    Conflict,
    EmptyUpdate,
    Forbidden,
    InvalidField,
    RefusedByDevice,
    Removed,
    SFPromptError,
    StaleRound,
    StepLost,
    Unreachable,
)
from protocol.messages import (
    MAX_LOSS,
    Assignment,
    EvaluationReport,
    JoinRequest,
    RunStatus,
    Task,
    UpdateMeta,
)
from protocol.plan import RunPlan
from split_model.predictions import PredictionCounter

if TYPE_CHECKING:
    from edge_client.training.proximal import Proximal

_POLL_S = 8.0  # so that silence of the server is noticed within ten seconds

_MAX_STARTS = 5  # starts of one round; then the device declines it


@dataclass(frozen=True)
class Participant:
    """A device that can join runs.

    Attributes:
        server: the split server; `join` authenticates it.
        data: the device's train and test images.
        folder: folder of the file cache.
        name: the device's name, for people.
        reporter: receives progress and events.
        cache_bytes: memory budget of each cache (resized images, smashed data), in bytes.
        shares_labels: whether the server may have the labels, in a run that asks for them.
        policy: what this device takes part in.
        compute: the library that computes; auto: NumPy, in each run in which it suffices.
    """

    server: Server
    data: Dataset
    folder: Path
    name: str
    reporter: Reporter
    cache_bytes: int = 256 * 1024 * 1024
    shares_labels: bool = False
    policy: DevicePolicy = field(default_factory=DevicePolicy)
    compute: Compute = "auto"

    def join(self, run: str, key: str, join_token: str | None = None) -> JoinedRun:
        """Join a run, and download head and global state unless they are cached.

        Args:
            run: the run's id.
            key: idempotency key; the same key gives the same participant.
            join_token: the server's token, if it requires one.

        Raises:
            InvalidField: the data have more classes than the run.
            InvalidField: the run needs the labels, and the server may not have them.
            RefusedByDevice: the device's policy forbids the run.
            RunClosed: the run is over.
        """
        request = JoinRequest(
            name=self.name,
            train_samples=len(self.data.train),
            test_samples=len(self.data.test),
            num_classes=len(self.data.class_names),
            classes_sha256=hash_names(self.data.class_names),
            shares_labels=self.shares_labels,
        )
        response = self.server.join(run, request, key, join_token)
        self.server.authenticate(response.credential)
        _check_classes(self.data, response.run.plan)
        memory = RunMemory(self.folder / "runs", run, response.participant)
        files = BlobCache(self.folder)
        try:
            model = RunModel.download(
                self.server, response.run, files, memory, self.policy, self.compute
            )
        except RefusedByDevice as error:
            self.server.end(run, _reason_of(error))
            raise
        joined = JoinedRun(self, response.participant, response.credential, model, memory)
        self.reporter.event(
            "joined",
            participant=joined.id,
            name=self.name,
            train_samples=len(self.data.train),
            test_samples=len(self.data.test),
        )
        return joined


class JoinedRun:
    """A run that the device has joined; it does the server's assignments.

    Args:
        device: the device.
        participant: the id that the server gave this device.
        credential: authenticates the device in this run.
        model: the run's model on this device.
        memory: what outlives this process.

    Attributes:
        id: the participant's id.
        run: the server's view of the run when the device joined.
        files: cache of the server's files.
        data: the device's images, without those that have become unreadable.
        validation: images that select the best state; None: the run has none.
        samples: the data with the caches of this run.
    """

    def __init__(
        self,
        device: Participant,
        participant: str,
        credential: str,
        model: RunModel,
        memory: RunMemory,
    ) -> None:
        self.id = participant
        self.credential = credential
        self.run = model.run
        self.files = model.files
        self.data, self.validation = split_validation(device, model.run.plan)
        self._run_model = model
        self._device = device
        self._server = device.server
        self._reporter = device.reporter
        self._settings = model.run.plan
        self._method = device_method(model.run.settings)
        self._memory = memory
        self.samples = self._open_samples()

    @property
    def model(self) -> Model:
        """The current head, prompts and tail; a new object after each new head."""
        return self._run_model.model

    def take_part(self) -> Assignment:
        """Carry out assignments until the server sends stop, and return that last assignment.

        Whatever ends the process earlier, the server is told, so that no round waits for it.
        """
        try:
            return self._take_part()
        except BaseException as error:
            if not isinstance(error, Unreachable):
                self._server.end(self.run.id, _reason_of(error))
            raise

    def upload(self) -> None:
        """Send samples and labels to a run that shares labels, unless the server has them.

        The device may end afterwards; the server finishes the run without it.
        """
        assignment = self._server.assignment(self.run.id, None, _POLL_S)
        if assignment.task is Task.UPLOAD:
            self._do_and_report(assignment)

    def _take_part(self) -> Assignment:
        done: Assignment | None = None
        while True:
            assignment = self._server.assignment(self.run.id, done, _POLL_S)
            if assignment.task is Task.STOP:
                self._memory.forget()
                traffic = self._server.traffic()
                self._reporter.event(
                    "stopped",
                    status=str(assignment.status),
                    reason=assignment.reason,
                    traffic=traffic.to_dict(),
                )
                return assignment
            if assignment.waiting and (done is None or assignment.waiting != done.waiting):
                self._reporter.event("waiting", reason=assignment.waiting)
            if done is None or _is_new(assignment, done):
                self._do_and_report(assignment)
            done = assignment

    def _do_and_report(self, assignment: Assignment) -> None:
        try:
            self._do_with_readable(assignment)
        except EmptyUpdate as error:
            self._report("nothing-to-train", assignment, str(error))
        except Conflict as error:  # the round, the run or this step is over
            self._report("left-behind", assignment, str(error))
        except Removed:
            raise
        except Forbidden as error:
            if error.field != "participant":
                raise
            # Another process left the run for this device: the next assignment is stop.
            self._report("left-behind", assignment, str(error))

    def _do_with_readable(self, assignment: Assignment) -> None:
        """Do the task. If an image has become unreadable, drop it and start again."""
        for _ in range(_MAX_STARTS - 1):
            try:
                self._do(assignment)
                return
            except CorruptImageError as error:
                self._report("begun-anew", assignment, str(error))
                self._drop_unreadable()
        self._do(assignment)

    def _open_samples(self) -> RunSamples:
        samples = open_samples(self._device, self.data, self.validation, self._run_model)
        samples.train.features.fitted = self._memory.start
        return samples

    def _drop_unreadable(self) -> None:
        """Continue without the images that have become unreadable, and report each.

        Raises:
            EmptyDatasetError: no training image is left.
        """
        reported = self.data.skipped
        self.data = self.data.readable()
        if self.validation is not None:
            self.validation = self.validation.readable()
        for skipped in self.data.skipped:
            if skipped not in reported:
                self._reporter.event("skipped", path=skipped.path, reason=skipped.reason)
        self.samples = self._open_samples()
        self._method.drop_sample_caches()

    def _do(self, assignment: Assignment) -> None:
        if assignment.task is Task.UPLOAD:
            self._share_labels()
        elif assignment.task is Task.TRAIN:
            self._train_until_complete(assignment)
        elif assignment.task is Task.EVALUATE:
            self._evaluate(assignment)

    def _share_labels(self) -> None:
        """Send samples and labels, if the owner agreed, so that the server needs no device.

        Raises:
            InvalidField: the owner did not agree.
            SamplesMissing: the server has no room for the samples.
        """
        if not (self._device.shares_labels and self._settings.shares_labels):
            raise InvalidField(
                "the server asks for labels that it may not have",
                field="shares_labels",
                limit=True,
                value=False,
            )
        share_labels(self.samples.plane, self.samples.train, self.samples.test)
        train, test = len(self.samples.train), len(self.samples.test)
        message = f"the server has {train} + {test} samples and labels, and needs no device now"
        self._reporter.event("labels-shared", train=train, test=test, message=message)

    def _train_until_complete(self, assignment: Assignment) -> None:
        """Train a round; start again if the server has lost its state of the round."""
        for _ in range(_MAX_STARTS):
            try:
                self._train_round(assignment)
                return
            except Diverged as error:
                self._decline(assignment, str(error))
                return
            except StepLost as error:
                self._report("begun-anew", assignment, str(error))
            except StaleRound as error:
                if assignment.round:
                    raise
                # Round 0 was computed without this device, but waits for its update.
                self._decline(assignment, str(error))
                return
        self._decline(assignment, f"the server lost its state of the round {_MAX_STARTS} times")

    def _decline(self, assignment: Assignment, reason: str) -> None:
        """Send an update without samples, so that the server does not wait for this device."""
        self._report("declined", assignment, reason)
        meta = UpdateMeta(round=assignment.round, attempt=assignment.attempt, samples=0)
        self._update_model(assignment)  # replaces the tuned state, which may have diverged
        self._run_model.send_update(meta)

    def _train_round(self, assignment: Assignment) -> None:
        started, before = time.monotonic(), self._server.traffic()
        self._update_model(assignment)
        context = self._context(assignment)
        result = self._method.train_round(context, self.samples.plane)
        if (fitted := self.samples.train.features.fitted) is not None:
            self._memory.keep_start(*fitted)
        meta = UpdateMeta(
            round=assignment.round,
            attempt=assignment.attempt,
            samples=result.samples,
            train_loss=result.train_loss,
            local_loss=result.local_loss,
            session=result.session,
        )
        self._run_model.send_update(meta, result.extras)
        self._reporter.event(
            "trained",
            round=assignment.round,
            kept=result.samples,
            local_loss=result.local_loss,
            train_loss=result.train_loss,
            seconds=time.monotonic() - started,
            bytes=self._server.traffic().since(before).total(),
        )

    def _context(self, assignment: Assignment) -> RoundContext:
        """Return what the round of an assignment works with; the model has its global state."""
        return RoundContext(
            self._settings,
            self._device.name,
            assignment.round,
            assignment.attempt,
            self.model,
            self.samples.train,
            self._reporter.advance,
            self._device.cache_bytes,
            self._proximal(),
            assignment.start,
            assignment.rate_scale,
        )

    def _proximal(self) -> Proximal | None:
        strength = self._settings.training.proximal
        if not strength or not needs_torch(self.run):  # a step of the classifier is whole
            return None
        from edge_client.training.proximal import proximal_of

        return proximal_of(self.model, strength)

    def _evaluate(self, assignment: Assignment) -> None:
        self._update_model(assignment)
        result = evaluate(
            self.model,
            self.samples.inference,
            self.samples.test,
            step=f"evaluate.{assignment.round}",
            round_=assignment.round,
            advance=self._reporter.advance,
            state=assignment.state.sha256,
            counter=PredictionCounter() if self._settings.training.reports_classes else None,
        )
        if not 0 <= result.loss_sum <= MAX_LOSS * result.samples:  # NaN too
            self._report("left-behind", assignment, "the global state has diverged")
            # Sent all the same, so that the server does not wait for this device.
            result = Evaluation(samples=0, correct=0, loss_sum=0.0)
        selection = self._selection_loss(assignment)
        report = EvaluationReport(
            round=assignment.round,
            attempt=assignment.attempt,
            samples=result.samples,
            correct=result.correct,
            loss_sum=result.loss_sum,
            selection_loss=None if selection is None else selection[0],
            selection_samples=0 if selection is None else selection[1],
            predictions=result.predictions,
        )
        self._server.send_evaluation(self.run.id, report)
        if report.samples:
            accuracy = result.correct / result.samples
            self._reporter.event(
                "evaluated", round=assignment.round, samples=result.samples, accuracy=accuracy
            )

    def _selection_loss(self, assignment: Assignment) -> tuple[float, int] | None:
        """Return the loss by which the server selects states, and its samples; None: none."""
        if not self._settings.selects_states:
            return None
        result = self._method.selection_loss(
            self._context(assignment),
            self.samples.plane,
            self.samples.validation,
            assignment.state.sha256,
        )
        if result is None:
            return None
        loss, samples = result
        return (MAX_LOSS if math.isnan(loss) else min(loss, MAX_LOSS)), samples

    def _update_model(self, assignment: Assignment) -> None:
        if self._run_model.update(assignment):
            head = self._run_model.head
            self._reporter.event("head-taken", sha256=head.sha256, bytes=head.nbytes)

    def _report(self, kind: str, assignment: Assignment, reason: str) -> None:
        self._reporter.event(kind, round=assignment.round, reason=reason)


def succeeded(last: Assignment) -> bool:
    """Whether the run has finished, judged by its last assignment."""
    return last.status is RunStatus.FINISHED


def _reason_of(error: BaseException) -> str:
    """Describe for the server why this process ends; nothing in it comes from the images."""
    if isinstance(error, KeyboardInterrupt):
        return "it was stopped"
    if isinstance(error, DataError):
        return "its images cannot be used any more"
    return error.code if isinstance(error, SFPromptError) else type(error).__name__


def _is_new(assignment: Assignment, done: Assignment) -> bool:
    current = (assignment.task, assignment.round, assignment.attempt)
    return current != (done.task, done.round, done.attempt)


def _check_classes(data: Dataset, settings: RunPlan) -> None:
    if len(data.class_names) > settings.model.num_classes:
        raise InvalidField(
            "the data have more classes than the run",
            field="data",
            limit=settings.model.num_classes,
            value=len(data.class_names),
        )
