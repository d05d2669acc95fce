"""Features and sums of participants that come after round 0, or have lost their features."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from protocol.codecs.registry import as_decoded
from protocol.errors import NotFound, StepLost
from split_server.closed_form.classifier import RidgeClassifier
from split_server.closed_form.known import KnownSamples, read_known, write_known
from split_server.closed_form.result import Features, Solved, read_solved
from split_server.closed_form.sample_features import CHUNK
from split_server.closed_form.solving import add_participant
from split_server.closed_form.sums import Sums, check_sums
from split_server.closed_form.tokens import BATCH, TokenReader, busy_error, require_own_ids
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import RunSnapshot
from split_server.runtime.aio import run_on
from split_server.storage.sample_store import Owner, SampleStore


class LaterFeatures:
    """Answers the requests of round 0 in later rounds without waiting for other participants.

    Args:
        runs: the runs.
        samples: the smashed data.
        reader: computes what the tail reads.
        threads: compute features and access files.
    """

    def __init__(
        self,
        runs: RunRegistry,
        samples: SampleStore,
        reader: TokenReader,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._runs, self._samples, self._reader, self._threads = runs, samples, reader, threads

    async def features(
        self, run_id: str, participant: str, ids: list[bytes]
    ) -> Features | list[int]:
        """Return features in the basis of round 0, or the positions of missing samples.

        Its updates count once it has sent its sums, too.

        Raises:
            NotFound: round 0 has no result.
            InvalidField: there are more ids than the participant joined with samples.
        """
        run, sender = self._runs.participant(run_id, participant)
        owner = Owner(run_id, participant)
        require_own_ids(ids, sender)
        missing = self._samples.list_missing(owner, ids)
        if missing:
            return missing
        solved = await run_on(self._threads, partial(self._read_solved, run))
        projected = []
        for first in range(0, len(ids), CHUNK):
            read = []
            for offset in range(first, min(first + CHUNK, len(ids)), BATCH):
                tokens = await self._reader.read(run, owner, ids[offset : offset + BATCH])
                if tokens is None:
                    raise busy_error("the server lost samples; send them again")
                read.append(tokens.half().float().cpu())
            # Through float16 and in chunks, as in round 0: the same features bit for bit.
            projected.append(solved.basis.project(torch.cat(read)))
        values = torch.cat(projected)
        known = KnownSamples(as_decoded(values, run.plan.wire.start).flatten(1))
        path = self._runs.files(run_id).known(_start_attempt(run), participant)
        await run_on(self._threads, partial(write_known, path, known))
        classifier = solved.classifier
        strength = classifier.strength / max(1, classifier.count)
        return Features(values, solved.mean, solved.variances, strength)

    async def classifier(
        self, run_id: str, participant: str, sums: Sums
    ) -> tuple[RidgeClassifier, Tensor]:
        """Take a participant's sums; return the classifier of round 0, and leverage 0 [n].

        Raises:
            NotFound: round 0 has no result.
            StepLost: the participant has not requested its features.
            InvalidField: no labels of the participant's samples give these sums.
        """
        run, files = self._runs.snapshot(run_id), self._runs.files(run_id)
        attempt = _start_attempt(run)

        def take() -> tuple[RidgeClassifier, Tensor]:
            known = read_known(files.known(attempt, participant))
            if known is None:
                raise StepLost("the server has no features of this participant", field="round")
            check_sums(sums, known.features)
            solved = self._read_solved(run)
            known = KnownSamples(known.features, sums)
            add_participant(files, run, attempt, solved, participant, known)
            return solved.classifier, torch.zeros(len(known.features))

        return await run_on(self._threads, take)

    def _read_solved(self, run: RunSnapshot) -> Solved:
        return read_solved(run.basis_file(self._runs.files(run.id)))


def _start_attempt(run: RunSnapshot) -> int:
    if run.start_attempt is None:
        raise NotFound("round 0 of this run has no result yet", field="round", value=0)
    return run.start_attempt
