"""Tune the body of a run with shared labels on all samples together, before its round 0.

One body, one optimiser, no copies and no bytes: SplitFed-V2's server side (arXiv 2004.12088) in
lock-step over the pooled smashed data. A tenth of the samples is not trained on. Only if the
closed-form start on the tuned body classifies these better does the body replace the backbone's,
and round 0 begins from it; otherwise the run goes on as if nothing had been tuned.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import shutil
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.errors import Busy
from protocol.seeds import derive_seed
from split_model.backbone.tensor_file import write_tensors
from split_model.backbone.weights import open_backbone
from split_model.parts.own_body import OwnBody
from split_server.closed_form.sample_features import SampleFeatures
from split_server.closed_form.tokens import BATCH, TokenReader, read_numbers
from split_server.engine.engine import Engine
from split_server.federation import records
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import RunSnapshot
from split_server.payloads.samples import decode_cached
from split_server.payloads.tensors import require_finite
from split_server.runtime.aio import run_on
from split_server.shared_labels.body_jobs import SENDER, OwnBodyJob
from split_server.shared_labels.labels import SamplesGone, read_labels
from split_server.shared_labels.pooled_start import PooledStart, fit_pooled
from split_server.storage.run_files import relative_to_data_dir
from split_server.storage.sample_store import Owner, SampleStore

_HELD_OUT = 10  # one of so many samples is not trained on

_WARM_UP = 0.1  # share of the steps in which the rate rises

_PAUSE_S = 0.2  # before a full engine is asked again

R = TypeVar("R")

Read = Callable[[str, list[bytes]], Awaitable[Tensor]]  # participant, ids


@dataclass(frozen=True)
class _Pool:
    """The training samples of all participants, in the run's order.

    Attributes:
        samples: participant and id of each.
        labels: int64 [N].
        is_train: bool [N].
    """

    samples: list[tuple[str, bytes]]
    labels: Tensor
    is_train: Tensor

    @property
    def train(self) -> Tensor:
        """The positions of the samples that are trained on."""
        return self.is_train.nonzero().flatten()


class BodyTunings:
    """Tunes bodies. Its coroutines run on one event loop; all arithmetic on bodies in the engine.

    Args:
        runs: the runs.
        engine: computes, in turn with all other work.
        samples: the smashed data.
        reader: computes what the tail reads through the frozen body.
        device: of the bodies.
        threads: compute the rest, and access files.
    """

    def __init__(
        self,
        runs: RunRegistry,
        engine: Engine,
        samples: SampleStore,
        reader: TokenReader,
        device: torch.device,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._runs, self._engine, self._samples = runs, engine, samples
        self._reader, self._device, self._threads = reader, device, threads
        self._count = itertools.count()

    async def tune(self, run: RunSnapshot) -> None:
        """Tune a run's body, and record whether it replaces the backbone's.

        Raises:
            SamplesGone: the server has lost samples.
        """
        folder = self._runs.files(run.id).root / "tuning"
        await self._run(partial(_make_empty, folder))
        try:
            pool = await self._run(partial(self._pool, run))
            before = await self._start(run, pool, folder / "before", partial(self._frozen, run))
            own = await self._run(partial(self._own_body, run))
            loss = await self._train(run, pool, before, own)
            after = await self._start(run, pool, folder / "after", partial(self._tuned, run, own))
            await self._run(partial(self._finish, run, own, before, after, loss))
        finally:
            self._engine.release(run.id, SENDER)
            await self._run(partial(shutil.rmtree, folder, ignore_errors=True))

    def _pool(self, run: RunSnapshot) -> _Pool:
        samples, labels = [], [torch.zeros(0, dtype=torch.int64)]
        for participant in run.in_order(run.labelled):
            shared = read_labels(self._runs.files(run.id).labels(participant))
            if shared is None:
                raise SamplesGone(participant)
            samples += [(participant, id_) for id_ in shared.train.ids]
            labels.append(shared.train.labels)
        generator = torch.Generator().manual_seed(derive_seed(run.plan.seed, "server-tuning"))
        order = torch.randperm(len(samples), generator=generator)
        is_train = torch.ones(len(samples), dtype=torch.bool)
        is_train[order[: len(samples) // _HELD_OUT]] = False
        return _Pool(samples, torch.cat(labels), is_train)

    def _own_body(self, run: RunSnapshot) -> OwnBody:
        weights, plan = open_backbone(run.backbone_path), run.plan
        seed = derive_seed(plan.seed, "server-tuning-weights")
        return OwnBody(plan.model, weights, plan.training.server_tuning, seed, self._device)

    async def _start(self, run: RunSnapshot, pool: _Pool, path: Path, read: Read) -> PooledStart:
        """Fit a start on what the tail reads of all samples.

        Args:
            run: the run.
            pool: its samples.
            path: of a file for what the tail reads.
            read: computes it for samples of one participant, [B, R, D].
        """
        features = SampleFeatures(path, len(pool.samples), read_numbers(run.plan.model))
        done = 0
        for participant, group in itertools.groupby(pool.samples, key=lambda each: each[0]):
            ids = [id_ for _, id_ in group]
            for first in range(0, len(ids), BATCH):
                tokens = await read(participant, ids[first : first + BATCH])
                flat = tokens.flatten(1).float().cpu()
                await self._run(partial(features.write, done, flat))
                done += len(flat)
        return await self._run(partial(fit_pooled, features, pool.labels, pool.is_train, run.plan))

    async def _frozen(self, run: RunSnapshot, participant: str, ids: list[bytes]) -> Tensor:
        tokens = await self._reader.read(run, Owner(run.id, participant), ids)
        if tokens is None:
            raise SamplesGone(participant)
        return tokens

    async def _tuned(
        self, run: RunSnapshot, own: OwnBody, participant: str, ids: list[bytes]
    ) -> Tensor:
        smashed = await self._run(partial(self._load, run, [(participant, id_) for id_ in ids]))
        return await self._submit(run, own, smashed, partial(_read, own))

    def _load(self, run: RunSnapshot, samples: list[tuple[str, bytes]]) -> Tensor:
        """Return smashed data [B, T, D] in the order of the samples."""
        rows: list[Tensor] = []
        for participant, id_ in samples:
            taken = self._samples.take(Owner(run.id, participant), [id_])
            if isinstance(taken, list):
                raise SamplesGone(participant)
            rows.append(decode_cached(*taken, self._device))
        return torch.cat(rows)

    async def _train(
        self, run: RunSnapshot, pool: _Pool, start: PooledStart, own: OwnBody
    ) -> float:
        """Train the body towards the start's classifier; return the last epoch's mean loss."""
        training = run.plan.training
        rate, size = training.server_learning_rate, training.batch_size
        optimizer = torch.optim.AdamW(own.parameters, lr=rate, weight_decay=training.weight_decay)
        head = start.to(self._device)
        seed = derive_seed(run.plan.seed, "server-tuning-order")
        generator = torch.Generator().manual_seed(seed)
        per_epoch = -(-len(pool.train) // size)
        total, mean = training.server_epochs * per_epoch, 0.0
        for step in range(total):
            if step % per_epoch == 0:
                order = pool.train[torch.randperm(len(pool.train), generator=generator)]
                losses = torch.zeros(0)
            rows = order[step % per_epoch * size :][:size]
            labels = pool.labels[rows].to(self._device)
            optimizer.param_groups[0]["lr"] = rate * _rate_factor(step / total)
            samples = [pool.samples[row] for row in rows.tolist()]
            smashed = await self._run(partial(self._load, run, samples))
            compute = partial(_step, own, optimizer, head, labels)
            loss = await self._submit(run, own, smashed, compute)
            losses = torch.cat([losses, loss.cpu().expand(len(rows))])
            mean = float(losses.mean())
        return mean

    async def _submit(
        self,
        run: RunSnapshot,
        own: OwnBody,
        smashed: Tensor,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run a job; wait while the engine is full."""
        job = OwnBodyJob(run.id, next(self._count), run.body, smashed, compute, own.nbytes(smashed))
        while True:
            try:
                return await self._engine.submit(job)
            except Busy:
                await asyncio.sleep(_PAUSE_S)

    def _finish(
        self, run: RunSnapshot, own: OwnBody, before: PooledStart, after: PooledStart, loss: float
    ) -> None:
        """Record the result; the weights are on disk before the database refers to them."""
        runs, files = self._runs, self._runs.files(run.id)
        weights = None
        if after.is_better_than(before):
            path, folded = files.weights_after(0), own.folded()
            require_finite(folded)
            write_tensors(path, folded, {"backbone": run.plan.model.backbone})
            weights = relative_to_data_dir(path, runs.data_dir)
        figures = {"training_loss": loss, "samples": before.samples}
        for name, start in (("before", before), ("after", after)):
            figures |= {f"loss_{name}": start.loss, f"correct_{name}": start.correct}
        with runs.changing(run.id) as session:
            records.record_tuning(session, run.id, weights, figures, runs.clock.wall())

    async def _run(self, function: Callable[[], R]) -> R:
        return await run_on(self._threads, function)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _read(own: OwnBody, smashed: Tensor) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = own.body(smashed)
        return tokens


def _step(
    own: OwnBody,
    optimizer: torch.optim.Optimizer,
    start: PooledStart,
    labels: Tensor,
    smashed: Tensor,
) -> Tensor:
    """Take one step on a batch [B, T, D] with labels [B]; return its mean loss, [1]."""
    with torch.enable_grad():
        features = start.basis.project(own.body(smashed)).flatten(1)
        loss = F.cross_entropy(features @ start.weight.T + start.bias, labels)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return loss.detach().reshape(1)


def _rate_factor(progress: float) -> float:
    """Return the learning rate's factor: a linear rise, then half a cosine down to 0."""
    if progress < _WARM_UP:
        return (progress + 0.01) / (_WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
