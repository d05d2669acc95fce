"""The features of a participant whose labels the server has, in the basis of round 0."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from protocol.codecs.registry import as_decoded
from split_model.linear_fit import USUAL_FACTOR, Features, one_hot_sums
from split_server.closed_form.known import read_known
from split_server.closed_form.result import Solved, read_solved
from split_server.closed_form.start import ClosedFormStarts
from split_server.closed_form.sums import Sums
from split_server.closed_form.tokens import BATCH, TokenReader
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import RunSnapshot
from split_server.runtime.aio import run_on
from split_server.shared_labels.labels import (
    LabelledSamples,
    Measured,
    SharedLabels,
    read_measured,
    write_measured,
)
from split_server.storage.sample_store import Owner


class SamplesGone(Exception):
    """The sample store lacks samples that the server needs: the device has to send them again."""


@dataclass(frozen=True)
class TrainFeatures:
    """A participant's training samples as later rounds use them.

    Attributes:
        features: with mean and variances of all participants'.
        decay: penalty of the classifier's steps.
    """

    features: Features
    decay: float


@dataclass(frozen=True)
class LabelledFeatures:
    """Computes features, or reads them from files.

    Args:
        runs: the runs.
        starts: compute the features of training samples.
        reader: computes what the tail reads of test samples.
        threads: compute, and access files.
    """

    runs: RunRegistry
    starts: ClosedFormStarts
    reader: TokenReader
    threads: ThreadPoolExecutor

    async def train(
        self, run: RunSnapshot, participant: str, samples: LabelledSamples
    ) -> TrainFeatures:
        """Return the training samples' features; one that came after round 0 gets them now.

        Raises:
            SamplesGone: the device has to send the samples again.
        """
        found = await run_on(self.threads, partial(self._read_train, run, participant))
        if found is not None:
            return found
        later = await self.starts.later.features(run.id, participant, samples.ids)
        if isinstance(later, list):
            raise SamplesGone
        decoded = as_decoded(later.values, run.plan.wire.start).flatten(1)
        sums = Sums(*one_hot_sums(decoded, samples.labels, run.plan.model.num_classes))
        await self.starts.later.classifier(run.id, participant, sums)
        features = Features(decoded, later.mean, later.variances, later.strength)
        decay = later.strength / USUAL_FACTOR
        path = self.runs.files(run.id).measured(_attempt(run), participant)
        await run_on(self.threads, partial(write_measured, path, Measured(decay)))
        return TrainFeatures(features, decay)

    def _read_train(self, run: RunSnapshot, participant: str) -> TrainFeatures | None:
        files = self.runs.files(run.id)
        known = read_known(files.known(_attempt(run), participant))
        measured = read_measured(files.measured(_attempt(run), participant))
        if known is None or measured is None:
            return None
        solved = self._solved(run)
        strength = solved.classifier.strength / max(1, solved.classifier.count)
        features = Features(known.features, solved.mean, solved.variances, strength)
        return TrainFeatures(features, measured.decay)

    async def held_out(
        self, run: RunSnapshot, participant: str, labels: SharedLabels
    ) -> tuple[Tensor, Tensor]:
        """Return features [m, r] and labels [m] of the test samples.

        Raises:
            SamplesGone: the device has to send the samples again.
        """
        path = self.runs.files(run.id).measured(_attempt(run), participant)
        measured = await run_on(self.threads, partial(read_measured, path)) or Measured(0.0)
        features = measured.held_out
        if features is None:
            features = await self._compute(run, participant, labels.test.ids)
            # Only behind the decay, which says that the participant has taken part.
            if len(labels.train) == 0 or path.is_file():
                kept = replace(measured, held_out=features)
                await run_on(self.threads, partial(write_measured, path, kept))
        return features, labels.test.labels

    async def _compute(self, run: RunSnapshot, participant: str, ids: list[bytes]) -> Tensor:
        solved = await run_on(self.threads, partial(self._solved, run))
        features = [torch.zeros(0, len(solved.basis.scale))]
        for first in range(0, len(ids), BATCH):
            tokens = await self.reader.read(
                run, Owner(run.id, participant), ids[first : first + BATCH]
            )
            if tokens is None:
                raise SamplesGone
            project = partial(solved.basis.project, tokens.float().cpu())
            features.append((await run_on(self.threads, project)).flatten(1))
        return torch.cat(features)

    def _solved(self, run: RunSnapshot) -> Solved:
        return read_solved(run.basis_file(self.runs.files(run.id)))


def _attempt(run: RunSnapshot) -> int:
    if run.start_attempt is None:
        raise ValueError("round 0 has no result yet")
    return run.start_attempt
