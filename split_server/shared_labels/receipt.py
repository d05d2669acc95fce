"""Take labels from devices, and delete them."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import Conflict, InvalidField
from split_server.federation import records
from split_server.federation.advance import RunAdvancer
from split_server.federation.permissions import require_running
from split_server.federation.runs import RunRegistry
from split_server.shared_labels.labels import SharedLabels, read_labels, write_labels
from split_server.storage.sample_store import Owner, SampleStore


@dataclass(frozen=True)
class LabelReceipt:
    """Takes and deletes the labels of participants. Thread-safe."""

    runs: RunRegistry
    advancer: RunAdvancer
    samples: SampleStore

    def receive(self, run_id: str, participant_id: str, labels: SharedLabels) -> list[int]:
        """Take a participant's labels; from then on the server does its tasks.

        Returns:
            The positions of samples that the server lacks, training before test samples; then
            nothing has changed.

        Raises:
            RunClosed: the run is over.
            InvalidField: the run shares no labels, or there are more samples than it joined with.
            Conflict: the server has other labels of this participant.
        """
        run, sender = self.runs.participant(run_id, participant_id)
        require_running(run)
        if not run.plan.shares_labels:
            raise InvalidField(
                "labels stay on the devices of this run",
                field="training.labels",
                limit="shared",
                value=run.plan.training.labels,
            )
        for kind, part, joined in (
            ("train", labels.train, sender.train_samples),
            ("test", labels.test, sender.test_samples),
        ):
            if len(part) > joined:
                raise InvalidField(
                    "a participant cannot label more samples than it joined with",
                    field=f"{kind}_ids",
                    limit=joined,
                    value=len(part),
                )
        ids = [*labels.train.ids, *labels.test.ids]
        if missing := self.samples.list_missing(Owner(run_id, participant_id), ids):
            return missing
        self._keep(run_id, participant_id, labels)
        self.advancer.try_advance(run_id)
        return []

    def _keep(self, run_id: str, participant_id: str, labels: SharedLabels) -> None:
        path = self.runs.files(run_id).labels(participant_id)
        with self.runs.lock(run_id):
            _, sender = self.runs.participant(run_id, participant_id)
            earlier = read_labels(path)
            if earlier is not None and sender.labelled:
                if not labels.is_equal(earlier):
                    raise Conflict(
                        "the server has other labels of this participant",
                        field="labels",
                        hint="delete them first: edge-client leave URL --samples-only",
                    )
                return
            write_labels(path, labels)
            with self.runs.changing(run_id) as session:
                at, count = self.runs.clock.wall(), len(labels.train) + len(labels.test)
                records.record_labels(session, run_id, participant_id, count, at)

    def forget(self, run_id: str, participant_id: str, reason: str) -> None:
        """Delete a participant's samples and, with them, its labels and features.

        The server does none of its tasks until the device has sent them again.
        """
        self.samples.drop(run_id, participant_id)
        run = self.runs.snapshot(run_id)
        if not run.plan.shares_labels:
            return
        with self.runs.lock(run_id):
            if self.runs.snapshot(run_id).participants[participant_id].labelled:
                with self.runs.changing(run_id) as session:
                    at = self.runs.clock.wall()
                    records.record_labels_lost(session, run_id, participant_id, reason, at)
            self.runs.files(run_id).drop_labels(participant_id)
        self.advancer.try_advance(run_id)
