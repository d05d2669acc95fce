"""The features of a participant whose labels the server has, in the basis of round 0.

They are in files once the participant has taken part: from then on the server needs no sample.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from protocol.codecs.registry import as_decoded
from split_model.linear_fit import USUAL_FACTOR, Features, one_hot_sums
from split_server.closed_form.known import read_known
from split_server.closed_form.result import Solved, read_solved
from split_server.closed_form.start import ClosedFormStarts
from split_server.closed_form.sums import Sums
from split_server.closed_form.tokens import BATCH
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import RunSnapshot
from split_server.runtime.aio import run_on
from split_server.shared_labels.labels import (
    LabelledSamples,
    Measured,
    SamplesGone,
    SharedLabels,
    read_measured,
    write_measured,
)
from split_server.storage.sample_store import Owner


@dataclass(frozen=True)
class Prepared:
    """A participant's samples as the rounds after round 0 use them.

    Attributes:
        train: features of the training samples, with mean and variances of all participants'; None:
            it has none.
        measured: the penalty of the classifier's steps, and features of the test samples.
    """

    train: Features | None
    measured: Measured


@dataclass(frozen=True)
class LabelledFeatures:
    """Computes features, or reads them from files.

    Args:
        runs: the runs.
        starts: compute features.
        threads: compute, and access files.
    """

    runs: RunRegistry
    starts: ClosedFormStarts
    threads: ThreadPoolExecutor

    async def prepared(self, run: RunSnapshot, participant: str, labels: SharedLabels) -> Prepared:
        """Return a participant's features; one that came after round 0 gets them now.

        Raises:
            SamplesGone: the device has to send the samples again.
        """
        has_train = bool(len(labels.train))
        read = partial(self._read, run, participant, has_train=has_train)
        found = await run_on(self.threads, read)
        if found is not None:
            return found
        train = await self._later(run, participant, labels.train) if has_train else None
        decay = train.strength / USUAL_FACTOR if train is not None else 0.0
        attempt = _attempt(run)
        measured = await self.keep(run, participant, attempt, decay, labels.test.ids)
        return Prepared(train, measured)

    async def keep(
        self, run: RunSnapshot, participant: str, attempt: int, decay: float, test: list[bytes]
    ) -> Measured:
        """Compute the features of the test samples, and keep them with the penalty in a file.

        Args:
            run, participant: whose.
            attempt: at round 0, in whose basis the features are.
            decay: the penalty.
            test: ids of the test samples.

        Raises:
            SamplesGone: the device has to send the samples again.
        """
        files = self.runs.files(run.id)
        solved = await run_on(self.threads, partial(read_solved, files.basis(attempt)))
        features = [torch.zeros(0, len(solved.basis.scale))]
        for first in range(0, len(test), BATCH):
            ids = test[first : first + BATCH]
            tokens = await self.starts.reader.read(run, Owner(run.id, participant), ids)
            if tokens is None:
                raise SamplesGone(participant)
            project = partial(solved.basis.project, tokens.float().cpu())
            features.append((await run_on(self.threads, project)).flatten(1))
        measured = Measured(decay, torch.cat(features))
        path = files.measured(attempt, participant)
        await run_on(self.threads, partial(write_measured, path, measured))
        return measured

    async def _later(
        self, run: RunSnapshot, participant: str, samples: LabelledSamples
    ) -> Features:
        later = await self.starts.later.features(run.id, participant, samples.ids)
        if isinstance(later, list):
            raise SamplesGone(participant)
        decoded = as_decoded(later.values, run.plan.wire.start).flatten(1)
        sums, counts = one_hot_sums(
            decoded.numpy(), samples.labels.numpy(), run.plan.model.num_classes
        )
        sent = Sums(torch.from_numpy(sums), torch.from_numpy(counts))
        await self.starts.later.classifier(run.id, participant, sent)
        mean, variances = later.mean.numpy(), later.variances.numpy()
        return Features(decoded.numpy(), mean, variances, later.strength)

    def _read(self, run: RunSnapshot, participant: str, *, has_train: bool) -> Prepared | None:
        files = self.runs.files(run.id)
        measured = read_measured(files.measured(_attempt(run), participant))
        if measured is None:
            return None
        if not has_train:
            return Prepared(None, measured)
        known = read_known(files.known(_attempt(run), participant))
        if known is None:
            return None
        solved = read_solved(run.basis_file(files))
        return Prepared(_features(known.features, solved), measured)


def _features(values: Tensor, solved: Solved) -> Features:
    strength = solved.classifier.strength / max(1, solved.classifier.count)
    return Features(values.numpy(), solved.mean.numpy(), solved.variances.numpy(), strength)


def _attempt(run: RunSnapshot) -> int:
    if run.start_attempt is None:
        raise ValueError("round 0 has no result yet")
    return run.start_attempt
