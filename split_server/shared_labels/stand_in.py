"""Do the tasks of devices that share their labels, in the place of these devices.

The server sends itself the updates and evaluations that such a device would send, so that a run
with shared labels has the rounds, the checks and the result of every other run.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from protocol.codecs.registry import as_decoded
from protocol.errors import (
    Busy,
    Forbidden,
    RunClosed,
    SFPromptError,
    StaleRound,
    StepLost,
)
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.messages import EvaluationReport, Task
from split_model.linear_fit import Fit, one_hot_sums
from split_server.closed_form.start import ClosedFormStarts
from split_server.closed_form.sums import Sums
from split_server.engine.engine import Engine
from split_server.federation.rounds import is_tuning_due, next_task
from split_server.federation.runs import RunRegistry
from split_server.federation.service import FederationService
from split_server.federation.snapshot import OpenRound, RunSnapshot
from split_server.runtime.aio import run_on
from split_server.shared_labels.body_jobs import SENDER
from split_server.shared_labels.labels import (
    SamplesGone,
    SharedLabels,
    read_labels,
)
from split_server.shared_labels.receipt import LabelReceipt
from split_server.shared_labels.samples import LabelledFeatures
from split_server.shared_labels.tuning import BodyTunings
from split_server.shared_labels.updates import Update, report, start_update, step_update
from split_server.storage.events import IdempotentRequest

log = logging.getLogger(__name__)

_TICK_S = 0.05  # between two looks for tasks

_PAUSE_S = 5.0  # after an unexpected error

_THREADS = 2


class StandIns:
    """Stands in for all devices whose labels the server has. Its coroutines run on one event loop.

    Args:
        runs: the runs.
        federation: takes the updates and evaluations.
        starts: computes round 0.
        receipt: deletes labels whose samples are gone.
        engine: tunes bodies.
        device: of the bodies.
    """

    def __init__(
        self,
        runs: RunRegistry,
        federation: FederationService,
        starts: ClosedFormStarts,
        receipt: LabelReceipt,
        engine: Engine,
        device: torch.device,
    ) -> None:
        self._runs, self._federation, self._starts = runs, federation, starts
        self._receipt = receipt
        self._threads = ThreadPoolExecutor(_THREADS, "split-stand-in")
        self._features = LabelledFeatures(runs, starts, self._threads)
        self._tunings = BodyTunings(
            runs, engine, receipt.samples, starts.reader, device, self._threads
        )
        self._working: dict[tuple[str, str], asyncio.Task[None]] = {}

    def close(self) -> None:
        """Stop computing."""
        self._threads.shutdown(cancel_futures=True)

    async def watch(self) -> None:
        """Do tasks as they come, until this coroutine is cancelled."""
        try:
            while True:
                await asyncio.sleep(_TICK_S)
                for run_id in self._runs.open_runs():
                    self._begin(run_id)
        finally:
            for task in self._working.values():
                task.cancel()

    def _begin(self, run_id: str) -> None:
        if not self._runs.has(run_id) or not (run := self._runs.snapshot(run_id)).labelled:
            return
        if is_tuning_due(run) and (run_id, SENDER) not in self._working:
            self._working[run_id, SENDER] = asyncio.create_task(self._do(run, SENDER, Task.TRAIN))
        for participant in run.labelled:
            task, key = next_task(run, participant), (run_id, participant)
            if task in (Task.TRAIN, Task.EVALUATE) and key not in self._working:
                self._working[key] = asyncio.create_task(self._do(run, participant, task))

    async def _do(self, run: RunSnapshot, participant: str, task: Task) -> None:
        """Do one task; whatever goes wrong, the next tick begins again."""
        try:
            if participant == SENDER:
                await self._tunings.tune(run)
            else:
                await self._do_once(run, participant, task)
        except SamplesGone as error:
            lacking, reason = error.participant, "the server no longer has its samples"
            await run_on(self._threads, partial(self._receipt.forget, run.id, lacking, reason))
        except (Busy, Forbidden, RunClosed, StaleRound, StepLost) as error:
            # Others are awaited, or the task is over.
            log.debug("run %s: the tasks of %s: %s", run.id, participant, error)
        except Exception as error:
            if not isinstance(error, SFPromptError):
                log.exception("run %s: the tasks of %s; retrying", run.id, participant)
            else:
                log.warning("run %s: the tasks of %s: %s; retrying", run.id, participant, error)
            await asyncio.sleep(_PAUSE_S)
        finally:
            self._working.pop((run.id, participant), None)

    async def _do_once(self, run: RunSnapshot, participant: str, task: Task) -> None:
        open_round, path = run.open_round, self._runs.files(run.id).labels(participant)
        labels = await run_on(self._threads, partial(read_labels, path))
        if open_round is None or labels is None:
            raise SamplesGone(participant)
        if task is Task.EVALUATE:
            await self._evaluate(run, open_round, participant, labels)
        elif open_round.round == 0:
            await self._start(run, open_round, participant, labels)
        else:
            await self._step(run, open_round, participant, labels)

    async def _start(
        self, run: RunSnapshot, open_round: OpenRound, participant: str, labels: SharedLabels
    ) -> None:
        """Take part in round 0, as a device does with the requests `start` and `solve`."""
        attempt, samples = open_round.attempt, labels.train
        features = await self._starts.features(run.id, participant, attempt, samples.ids)
        if isinstance(features, list):
            raise SamplesGone(participant)
        decode = partial(as_decoded, features.values, run.plan.wire.start)
        decoded = (await run_on(self._threads, decode)).flatten(1)
        sums, counts = one_hot_sums(
            decoded.numpy(), samples.labels.numpy(), run.plan.model.num_classes
        )
        sent = Sums(torch.from_numpy(sums), torch.from_numpy(counts))
        classifier, leverage = await self._starts.classifier(run.id, participant, attempt, sent)
        strength = classifier.strength / max(1, classifier.count)
        weight, bias = classifier.weight.numpy(), classifier.bias.numpy()
        fit = Fit(weight, bias, leverage.numpy(), strength)

        scale = partial(start_update, open_round, fit, decoded, samples.labels)
        update, decay = await run_on(self._threads, scale)
        # Before the update, so that afterwards the server needs no sample.
        await self._features.keep(run, participant, attempt, decay, labels.test.ids)
        await run_on(self._threads, partial(self._send, run, participant, update))

    async def _step(
        self, run: RunSnapshot, open_round: OpenRound, participant: str, labels: SharedLabels
    ) -> None:
        """Do the steps of a later round."""
        prepared = await self._features.prepared(run, participant, labels)
        if (features := prepared.train) is None:
            raise SamplesGone(participant)

        def send() -> None:
            update = step_update(
                open_round,
                self._runs.files(run.id).read_state(run.state),
                features,
                labels.train.labels,
                prepared.measured.decay,
                run.plan.training.local_epochs,
            )
            self._send(run, participant, update)

        await run_on(self._threads, send)

    async def _evaluate(
        self, run: RunSnapshot, open_round: OpenRound, participant: str, labels: SharedLabels
    ) -> None:
        """Measure the newest global state."""
        prepared = await self._features.prepared(run, participant, labels)
        measured = prepared.measured
        train = None
        if prepared.train is not None:
            train = prepared.train, labels.train.labels, measured.decay

        def send() -> None:
            state = self._runs.files(run.id).read_state(run.state)
            with torch.no_grad():
                held_out = measured.held_out, labels.test.labels
                result = report(open_round, run.plan, state, held_out, train)
            self._send_report(run, participant, result)

        await run_on(self._threads, send)

    def _send(self, run: RunSnapshot, participant: str, update: Update) -> None:
        tensors = {name: (tensor, "float32") for name, tensor in update.state.items()}
        data = join_frame(encode_frame("update", update.meta.model_dump(), tensors))
        scope = f"{run.id}/{participant}/update"
        idempotent = IdempotentRequest.of(scope, uuid.uuid4().hex, data)
        self._federation.update(run.id, participant, update.meta, decode_frame(data), idempotent)

    def _send_report(self, run: RunSnapshot, participant: str, measured: EvaluationReport) -> None:
        scope = f"{run.id}/{participant}/evaluation"
        content = measured.model_dump_json().encode()
        idempotent = IdempotentRequest.of(scope, uuid.uuid4().hex, content)
        self._federation.evaluation(run.id, participant, measured, idempotent)
