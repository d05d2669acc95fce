"""A run's round 0: all its participants name their samples, then send sums, and get a classifier.

Both steps wait for every participant, so a request is held back until the last one has come, or
until a share of the round's time is over. Only the classifier's file outlives the server; whatever
is lost before it is written is asked for again.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from protocol.errors import DamagedFile, InvalidField, StaleRound, StepLost
from protocol.messages import RoundStatus
from split_server.closed_form.basis import Moments
from split_server.closed_form.classifier import RidgeClassifier
from split_server.closed_form.known import KnownSamples, write_known
from split_server.closed_form.later import LaterFeatures
from split_server.closed_form.result import (
    Features,
    Fitted,
    Solved,
    decode_all,
    fit_features,
    project_all,
    read_solved,
)
from split_server.closed_form.sample_features import SampleFeatures
from split_server.closed_form.solving import add_participant, solve_start
from split_server.closed_form.sums import Sums, check_sums
from split_server.closed_form.tokens import (
    BATCH,
    TokenReader,
    busy_error,
    read_numbers,
    require_own_ids,
)
from split_server.engine.engine import Engine
from split_server.federation.permissions import require_pending_update, require_trainer
from split_server.federation.records import decline_update
from split_server.federation.rounds import pending_trainers
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import RunSnapshot
from split_server.runtime.aio import run_on, wait_for
from split_server.storage.sample_store import Owner, SampleStore

_WAIT_S = 20.0  # the longest that a request waits for other participants; then it is repeated

_THREADS = 2

# Shares of the round's time after which no more ids, or sums, are awaited.
_IDS_SHARE, _SUMS_SHARE = Fraction(1, 2), Fraction(3, 4)

R = TypeVar("R")


@dataclass
class _Start:
    """One attempt at round 0 of one run, on the event loop's thread.

    Attributes:
        restored: the result that an earlier process of the server has computed.
    """

    run: str
    attempt: int
    folder: Path
    restored: Solved | None = None
    ids: dict[str, list[bytes]] = field(default_factory=dict)
    features: dict[str, SampleFeatures] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    fitted_at: float = 0.0  # on the monotonic clock
    fitting: asyncio.Task[Fitted | None] | None = None
    solving: asyncio.Task[Solved] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class ClosedFormStarts:
    """Computes the closed-form starts of all runs. Its coroutines run on one event loop.

    Args:
        runs: the runs.
        engine: computes the features.
        samples: the smashed data.
        device: decodes smashed data there.

    Attributes:
        later: answers participants that request their features after round 0.
        reader: computes what the tail reads of samples.
    """

    def __init__(
        self,
        runs: RunRegistry,
        engine: Engine,
        samples: SampleStore,
        device: torch.device,
        max_wait_s: float = _WAIT_S,
    ) -> None:
        self._wait_s = min(_WAIT_S, max_wait_s)
        self._runs, self._samples = runs, samples
        self._threads = ThreadPoolExecutor(_THREADS, "split-start")
        self.reader = TokenReader(runs, engine, samples, device, self._threads)
        self.later = LaterFeatures(runs, samples, self.reader, self._threads)
        self._starts: dict[str, _Start] = {}
        self._lock = threading.Lock()  # guards `_starts`: runs end on other threads

    def close(self) -> None:
        """Stop computing."""
        self._threads.shutdown(cancel_futures=True)

    def sweep(self) -> None:
        """Drop the starts of runs that do not train round 0 any more. Thread-safe."""
        for run_id in list(self._starts):
            open_round = self._runs.snapshot(run_id).open_round
            training = open_round is not None and open_round.status == RoundStatus.TRAINING
            if open_round is None or open_round.round > 0 or not training:
                self.release(run_id)

    def release(self, run_id: str) -> None:
        """Drop a run's start, if there is one. Thread-safe."""
        with self._lock:
            start = self._starts.pop(run_id, None)
        if start is not None:
            shutil.rmtree(start.folder, ignore_errors=True)

    async def features(
        self, run_id: str, participant: str, attempt: int, ids: list[bytes]
    ) -> Features | list[int]:
        """Return the features of a participant's samples, or the positions of missing samples.

        Waits until all participants have sent their ids.

        Raises:
            Busy: other participants are still awaited; repeat the request.
            StaleRound: the round is not open, or was started without this participant.
            InvalidField: there are more ids than the participant joined with samples.
        """
        start = await self._open(run_id, participant, attempt)
        require_own_ids(ids, self._runs.participant(run_id, participant)[1])
        missing = self._samples.list_missing(Owner(run_id, participant), ids)
        if missing:
            return missing
        if start.restored is not None:
            start.ids[participant] = ids
            run = self._runs.snapshot(run_id)
            if not await self._compute(start, run, participant, None):
                raise busy_error("the server lost samples; send them again")
            solved = start.restored
            basis, mean, variances = solved.basis, solved.mean, solved.variances
        else:
            if start.fitting is None:
                start.ids[participant] = ids
                start.changed.set()
            fitted = await self._await_fit(start)
            basis, mean, variances = fitted.basis, fitted.sums.mean, fitted.sums.variances
        if start.ids.get(participant) != ids:
            raise StaleRound("this round was started without this participant", field="round")
        values = await self._run(partial(project_all, basis, start.features[participant]))
        return Features(values, mean, variances)

    async def classifier(
        self, run_id: str, participant: str, attempt: int, sums: Sums
    ) -> tuple[RidgeClassifier, Tensor]:
        """Return the classifier and the leverage [n] of the participant's samples.

        If no labels give these sums, the server declines the participant's update and records an
        event; the others no longer wait for it.

        Raises:
            Busy: other participants are still awaited; repeat the request.
            StepLost: the server has no features of this attempt; start the round again.
            StaleRound: the round is not open, or the participant's update was declined.
            InvalidField: no labels of the participant's samples give these sums.
        """
        start = await self._open(run_id, participant, attempt)
        run, sender = self._runs.participant(run_id, participant)
        require_pending_update(run, sender, 0, attempt)
        features = start.features.get(participant)
        if features is None:
            raise StepLost(
                "the server has no features of this round's start", field="round", value=0
            )
        fitted = start.fitting.result() if start.fitting and start.fitting.done() else None
        basis = start.restored.basis if start.restored else fitted.basis if fitted else None
        if basis is None:
            raise StepLost("the start is being computed again", field="round", value=0)
        decoded = await self._run(partial(decode_all, basis, features, run.plan.wire.start))
        try:
            await self._run(partial(check_sums, sums, decoded))
        except InvalidField as error:
            await self._run(partial(self._decline, run, participant, error))
            start.changed.set()
            raise
        files, known = self._runs.files(run_id), KnownSamples(decoded, sums)
        path = files.known(attempt, participant)
        if start.solving is None and start.restored is None:
            await self._run(partial(write_known, path, known))
        solved = start.restored or await self._await_solution(start, participant, sums)
        if participant not in start.sums and not (start.restored and path.is_file()):
            # Too late for the fit: its labels are compared with those that were in time.
            await self._run(
                partial(add_participant, files, run, attempt, solved, participant, known)
            )
        leverage = await self._run(partial(solved.classifier.leverage, decoded))
        return solved.classifier, leverage.float()

    async def _open(self, run_id: str, participant: str, attempt: int) -> _Start:
        """Return the open start of this attempt, created if needed."""
        run, sender = self._runs.participant(run_id, participant)
        require_trainer(run, sender, 0, attempt)
        start = self._starts.get(run_id)
        if start is not None and start.attempt == attempt:
            return start
        return await self._run(partial(self._create, run_id, attempt))

    def _create(self, run_id: str, attempt: int) -> _Start:
        with self._lock:
            start = self._starts.get(run_id)
            if start is None or start.attempt != attempt:
                folder = self._runs.files(run_id).root / "start"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                restored = self._restore(run_id, attempt)
                start = self._starts[run_id] = _Start(run_id, attempt, folder, restored)
            return start

    def _restore(self, run_id: str, attempt: int) -> Solved | None:
        path = self._runs.files(run_id).basis(attempt)
        try:
            return read_solved(path) if path.is_file() else None
        except DamagedFile:
            path.unlink()  # the participants send again what it was computed from
            return None

    async def _await_fit(self, start: _Start) -> Fitted:
        def begin() -> None:
            if start.fitting is None and self._is_complete(start, start.ids, _IDS_SHARE):
                start.fitting = asyncio.create_task(self._fit(start))

        fitted = await self._wait(start, begin, lambda: start.fitting)
        if fitted is None:
            raise busy_error("the server lost samples; send them again")
        return fitted

    async def _await_solution(self, start: _Start, participant: str, sums: Sums) -> Solved:
        fitted = start.fitting.result() if start.fitting and start.fitting.done() else None
        if fitted is None:
            raise StepLost("the start is being computed again", field="round", value=0)
        if start.solving is None:
            start.sums[participant] = sums
            start.changed.set()

        def begin() -> None:
            if start.solving is None and self._is_complete(
                start, start.sums, _SUMS_SHARE, start.fitted_at
            ):
                start.solving = asyncio.create_task(self._solve(start, fitted))

        return await self._wait(start, begin, lambda: start.solving)

    async def _wait(
        self,
        start: _Start,
        begin: Callable[[], None],
        task: Callable[[], asyncio.Task[R] | None],
    ) -> R:
        """Wait until a task has begun and ended.

        Raises:
            Busy: it has not, in time.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._wait_s
        while (left := give_up_at - loop.time()) > 0:
            begin()
            running = task()
            if running is None:
                start.changed.clear()
                await wait_for(start.changed, min(left, 1.0))
                continue
            done, _ = await asyncio.wait({running}, timeout=left)
            if done:
                return running.result()
        raise busy_error("still waiting for other participants")

    def _is_complete(
        self, start: _Start, answers: Mapping[str, object], share: Fraction, since: float = 0.0
    ) -> bool:
        """Whether every participant that can still answer has, or the time for it is over.

        Args:
            start: the run's start.
            answers: by participant.
            share: of the round's time, after which no more answers are awaited.
            since: answers are awaited for at least an eighth of the round's time after this moment.
        """
        run = self._runs.snapshot(start.run)
        if run.open_round is None or not answers:
            return False
        awaited = [each for each in pending_trainers(run, run.open_round) if each not in answers]
        if not awaited or run.deadline is None:
            return not awaited
        whole = run.plan.federation.round_timeout_s
        until = max(run.deadline - whole * float(1 - share), since + whole / 8)
        return self._runs.clock.monotonic() > until

    async def _fit(self, start: _Start) -> Fitted | None:
        """Compute all features and the basis; None: the server has lost samples."""
        run = self._runs.snapshot(start.run)
        moments = Moments(read_numbers(run.plan.model))
        order = run.in_order(frozenset(start.ids))
        fitted: Fitted | None = None
        try:
            for participant in order:
                if not await self._compute(start, run, participant, moments):
                    start.ids.pop(participant)
                    return None
            features = [start.features[participant] for participant in order]
            fitted = await self._run(partial(fit_features, moments, run.plan, features))
            start.fitted_at = self._runs.clock.monotonic()
            return fitted
        finally:
            if fitted is None:  # the next request begins again
                start.features.clear()
                start.fitting = None

    async def _compute(
        self, start: _Start, run: RunSnapshot, participant: str, moments: Moments | None
    ) -> bool:
        """Compute what the tail reads of one participant's samples; False: some are missing.

        Args:
            start: the run's open start.
            run: the run.
            participant: its id.
            moments: to which the samples are added; None: the basis is already fitted.
        """
        ids, owner = start.ids[participant], Owner(run.id, participant)
        numbers = read_numbers(run.plan.model)
        features = SampleFeatures(start.folder / participant, len(ids), numbers)
        for first in range(0, len(ids), BATCH):
            tokens = await self.reader.read(run, owner, ids[first : first + BATCH])
            if tokens is None:
                return False
            flat = tokens.flatten(1).float().cpu()
            await self._run(partial(_add, moments, features, first, flat))
        start.features[participant] = features
        return True

    async def _solve(self, start: _Start, fitted: Fitted) -> Solved:
        run = self._runs.snapshot(start.run)
        order = run.in_order(frozenset(start.sums))
        parts = [(each, start.features[each], start.sums[each]) for each in order]
        try:
            return await self._run(
                partial(solve_start, self._runs.files(start.run), run, start.attempt, fitted, parts)
            )
        except BaseException:
            start.solving = None  # the next request begins again
            raise

    def _decline(self, run: RunSnapshot, participant: str, error: InvalidField) -> None:
        """Decline a participant's update, once."""
        with self._runs.changing(run.id) as session:
            open_round = self._runs.snapshot(run.id).open_round
            if open_round is None or participant in open_round.declined:
                return
            at = self._runs.clock.wall()
            decline_update(session, run.id, open_round, participant, error, at)
        self._runs.refusals[run.id] += 1

    async def _run(self, function: Callable[[], R]) -> R:
        return await run_on(self._threads, function)


def _add(moments: Moments | None, features: SampleFeatures, first: int, flat: Tensor) -> None:
    features.write(first, flat)
    if moments is not None:
        moments.add(flat)
