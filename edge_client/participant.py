"""A device's life in a run: join, and take assignments until it is told to stop."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edge_client.data import Augmentation, BatchReader, CorruptImageError, Dataset
from edge_client.model import DeviceModel
from edge_client.reporter import Reporter
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.smashed.uploads import SampleUploader
from edge_client.storage.blob_cache import BlobCache
from edge_client.storage.global_state import GlobalStates
from edge_client.storage.identity import device_secret
from edge_client.training import (
    Diverged,
    Evaluation,
    Proximal,
    RoundContext,
    Samples,
    evaluate,
    inactive_neurons,
    local_update,
    select_samples,
    split_train,
)
from edge_client.transport import Server, SplitPlane
from edge_client.transport.connection import Body
from protocol.errors import (
    Conflict,
    EmptyUpdate,
    Forbidden,
    InvalidField,
    NotFound,
    StaleRound,
    StepLost,
)
from protocol.messages import (
    MAX_LOSS,
    NEURONS,
    Assignment,
    BlobRef,
    EvaluationReport,
    JoinRequest,
    JoinResponse,
    RunStatus,
    Task,
    UpdateMeta,
)
from protocol.seeds import derive_seed

_POLL_S = 20.0

_BEGINNINGS = 5  # of one round, before this device leaves it to the others


@dataclass
class Participant:
    """One device in one run.

    Args:
        server: where to; authenticated by `join`.
        data: this device's own train and test images.
        folder: for cached files of the server.
        name: what people call this device.
        cache_bytes: how much memory resized images may take, per set.
    """

    server: Server
    data: Dataset
    folder: Path
    name: str
    reporter: Reporter
    cache_bytes: int = 256 * 1024 * 1024

    def join(self, run: str, key: str, join_token: str | None = None) -> str:
        """Join, and get the head and the first global state, from the cache where it has them.

        Returns the credential, which this device may need without taking part.

        Raises:
            InvalidField: this device's classes are more than the run has.
            RunClosed: the run is over.
        """
        request = JoinRequest(
            name=self.name,
            train_samples=len(self.data.train),
            test_samples=len(self.data.test),
            num_classes=len(self.data.class_names),
            classes_sha256=_hash_of(self.data.class_names),
        )
        joined: JoinResponse = self.server.join(run, request, key, join_token)
        self.id, self.run = joined.participant, joined.run
        self.settings = joined.run.settings.plan
        self.server.authenticate(joined.credential)
        if len(self.data.class_names) > self.settings.model.num_classes:
            raise InvalidField(
                "the data have more classes than the run",
                field="data",
                limit=self.settings.model.num_classes,
                value=len(self.data.class_names),
            )
        self.files = BlobCache(self.folder)
        try:
            head = self._fetch_head(self.run.head)
        except NotFound:  # the run has got another one since the answer to the join
            self.run = self.server.run(run)
            head = self._fetch_head(self.run.head)
        self._states = GlobalStates(self.server, self.run.id, self.settings.wire, self.files)
        state = self._states.fetch(self.run.state)
        self.model = DeviceModel.load(self.settings.model, head, state)
        self._read_data()
        self.reporter.event(
            "joined",
            participant=self.id,
            name=self.name,
            train_samples=len(self.data.train),
            test_samples=len(self.data.test),
        )
        return joined.credential

    def take_part(self) -> Assignment:
        """Do what the server asks for until it says stop. Returns that last assignment."""
        done: Assignment | None = None
        while True:
            assignment = self.server.assignment(self.run.id, done, _POLL_S)
            if assignment.task is Task.STOP:
                traffic = self.server.traffic()
                self.reporter.event(
                    "stopped",
                    status=str(assignment.status),
                    reason=assignment.reason,
                    traffic=traffic.to_dict(),
                )
                return assignment
            if done is None or _differ(assignment, done):
                self._carry_out(assignment)
            done = assignment

    def _read_data(self) -> None:
        """Both sets, with nothing known of them yet."""
        augmentation = None
        if self.settings.training.augment:
            augmentation = Augmentation(derive_seed(self.settings.seed, "augment", self.name))
        way, cache = self.model.preprocessing, self.cache_bytes
        self._plane = SplitPlane(self.server, self.settings, copies_bytes=cache)
        train = BatchReader(self.data.train, way, cache_bytes=cache, augmentation=augmentation)
        self._train = self._samples(train)
        self._test = self._samples(BatchReader(self.data.test, way, cache_bytes=cache))

    def _leave_out_unreadable(self) -> None:
        """Go on without the images that have gone since the device joined; each is named.

        Raises:
            EmptyDatasetError: there is none left.
        """
        known = self.data.skipped
        self.data = self.data.readable()
        for skipped in (one for one in self.data.skipped if one not in known):
            self.reporter.event("skipped", path=skipped.path, reason=skipped.reason)
        self._read_data()

    def _samples(self, images: BatchReader) -> Samples:
        settings = self.settings
        if settings.model.prompt_at != "cut":
            return Samples(images)
        outputs = HeadOutputs(self.model.head, images, self.cache_bytes)
        if not settings.wire.keep_smashed:
            return Samples(images, outputs)
        form = f"{self._head.sha256} {settings.wire.smashed}"
        secret = device_secret(self.folder)
        return Samples(images, outputs, SampleUploader(outputs, images, self._plane, secret, form))

    def _carry_out(self, assignment: Assignment) -> None:
        try:
            for _ in range(_BEGINNINGS - 1):
                try:
                    self._do(assignment)
                    return
                except CorruptImageError as error:
                    reason = str(error)
                    self.reporter.event("begun-anew", round=assignment.round, reason=reason)
                    self._leave_out_unreadable()
            self._do(assignment)
        except EmptyUpdate as error:
            self.reporter.event("nothing-to-train", round=assignment.round, reason=str(error))
        except Conflict as error:  # the round, the run or this step is over: see what is next
            self.reporter.event("left-behind", round=assignment.round, reason=str(error))
        except Forbidden as error:
            if error.field != "participant":
                raise
            # This device was taken out of the run, by another process of it: it is told to stop.
            self.reporter.event("left-behind", round=assignment.round, reason=str(error))

    def _do(self, assignment: Assignment) -> None:
        if assignment.task is Task.TRAIN:
            self._train_until_counted(assignment)
        elif assignment.task is Task.EVALUATE:
            self._evaluate(assignment)

    def _train_until_counted(self, assignment: Assignment) -> None:
        """Train a round, and from its start again where the server has lost its part of it."""
        for _ in range(_BEGINNINGS):
            try:
                self._train_round(assignment)
                return
            except Diverged as error:
                self._decline(assignment, str(error))
                return
            except StepLost as error:
                self.reporter.event("begun-anew", round=assignment.round, reason=str(error))
        self._decline(assignment, f"{_BEGINNINGS} times the server has lost its part of the round")

    def _decline(self, assignment: Assignment, reason: str) -> None:
        """Say that nothing comes from this device in this round, so that nobody waits for it."""
        self.reporter.event("declined", round=assignment.round, reason=reason)
        meta = UpdateMeta(round=assignment.round, attempt=assignment.attempt, samples=0)
        self._take_state(assignment)  # nothing that has diverged is sent
        self._states.send(meta, self.model.state())

    def _train_round(self, assignment: Assignment) -> None:
        started, before = time.monotonic(), self.server.traffic()
        self._take_state(assignment)
        strength = self.settings.training.proximal
        proximal = Proximal(self.model, strength) if strength else None
        if assignment.round == 1 and self.settings.model.prompt_init == "mean-token":
            self.model.add_mean_token(self._train.images)
        context = RoundContext(
            self.settings,
            self.name,
            assignment.round,
            assignment.attempt,
            self.model,
            self._train,
            self.reporter.advance,
            proximal,
        )
        kept = select_samples(context)
        local_loss = local_update(context)
        through_server = len(kept) > 0 and self.settings.training.split_epochs > 0
        trained = split_train(context, self._plane, kept) if through_server else None
        train_loss = trained.loss if trained else None
        meta = UpdateMeta(
            round=assignment.round,
            attempt=assignment.attempt,
            samples=len(kept),
            train_loss=train_loss,
            local_loss=local_loss,
            session=trained.session if trained else None,
        )
        beside: dict[str, Tensor] = {}
        if self.settings.distillation.due(assignment.round, self.settings.federation.rounds):
            beside[NEURONS] = inactive_neurons(context, kept)
        self._states.send(meta, self.model.state(), beside)
        self.reporter.event(
            "trained",
            round=assignment.round,
            kept=len(kept),
            local_loss=local_loss,
            train_loss=train_loss,
            seconds=time.monotonic() - started,
            bytes=self.server.traffic().since(before).total(),
        )

    def _evaluate(self, assignment: Assignment) -> None:
        self._take_state(assignment)
        measured = evaluate(
            self.model,
            self._plane,
            self._test,
            round_=assignment.round,
            advance=self.reporter.advance,
            state=assignment.state.sha256,
        )
        if not 0 <= measured.loss_sum <= MAX_LOSS * measured.samples:  # NaN too
            self.reporter.event(
                "left-behind", round=assignment.round, reason="the global state has diverged"
            )
            measured = Evaluation(samples=0, correct=0, loss_sum=0.0)  # nobody is to wait
        report = EvaluationReport(
            round=assignment.round,
            attempt=assignment.attempt,
            samples=measured.samples,
            correct=measured.correct,
            loss_sum=measured.loss_sum,
        )
        self.server.send_evaluation(self.run.id, report)
        if not report.samples:
            return
        self.reporter.event(
            "evaluated",
            round=assignment.round,
            samples=measured.samples,
            accuracy=measured.correct / measured.samples,
        )

    def _take_state(self, assignment: Assignment) -> None:
        if assignment.head is not None and assignment.head != self._head:
            self._take_head(assignment.head, assignment.state)
        self.model.take(self._states.fetch(assignment.state))
        self.files.drop_old(keep={self._head.sha256})

    def _take_head(self, head: BlobRef, state: BlobRef) -> None:
        """Go on with another head than so far, and with the state that belongs to it.

        Raises:
            StaleRound: the run has yet another one by now.
        """
        try:
            file = self._fetch_head(head)
        except NotFound as error:
            raise StaleRound(str(error), field="head", value=head.sha256) from error
        self.model = DeviceModel.load(self.settings.model, file, self._states.fetch(state))
        self.reporter.event("head-taken", sha256=head.sha256, bytes=head.nbytes)

    def _fetch_head(self, head: BlobRef) -> Path:
        def download(start: int) -> Body:
            if self.settings.distillation.every:  # then there may be another one by now
                return self.server.head(self.run.id, start, head.sha256)
            return self.server.head(self.run.id, start)

        file = self.files.fetch(head, download)
        self._head = head
        return file


def _differ(one: Assignment, other: Assignment) -> bool:
    return (one.task, one.round, one.attempt) != (other.task, other.round, other.attempt)


def succeeded(last: Assignment) -> bool:
    """Whether the run ended as it was meant to."""
    return last.status is RunStatus.FINISHED


def _hash_of(class_names: Sequence[str]) -> str:
    """SHA-256 over the names in order, each with a newline behind it."""
    return hashlib.sha256("".join(f"{name}\n" for name in class_names).encode()).hexdigest()
