"""What the tail reads of participants' samples, computed from the smashed data that they sent."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from protocol.errors import Busy, InvalidField
from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_model.parts.depths import read_tokens
from split_server.engine.api import InferJob
from split_server.engine.engine import Engine
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import Participant, RunSnapshot
from split_server.payloads.samples import decode_cached
from split_server.runtime.aio import run_on
from split_server.storage.run_files import read_prompts
from split_server.storage.sample_store import Owner, SampleStore

BATCH = 256  # samples computed at a time

_PAUSE_S = 0.2  # before a full engine is asked again

_MAX_REPEATS = 2  # ids for each different one: pictures may be equal


class TokenReader:
    """Runs smashed data of the sample store through bodies.

    Args:
        runs: the runs.
        engine: computes.
        samples: the smashed data.
        device: decodes smashed data there.
        threads: decode them.
    """

    def __init__(
        self,
        runs: RunRegistry,
        engine: Engine,
        samples: SampleStore,
        device: torch.device,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._runs, self._engine, self._samples, self._device = runs, engine, samples, device
        self._threads = threads

    async def read(self, run: RunSnapshot, owner: Owner, ids: list[bytes]) -> Tensor | None:
        """Compute what the tail reads of samples, [B, R, D]; None: the server lacks some."""
        server, files = run.state.server, self._runs.files(run.id)
        prompts = None if server is None else read_prompts(files.server_state(server.sha256))
        smashed = await run_on(self._threads, partial(self._load, owner, ids))
        if smashed is None:
            return None
        return await self._infer(InferJob(run.id, owner.participant, run.body, smashed, prompts))

    def _load(self, owner: Owner, ids: list[bytes]) -> Tensor | None:
        """Return smashed data [B, T, D]; None: the server lacks some of them."""
        taken = self._samples.take(owner, ids)
        return None if isinstance(taken, list) else decode_cached(*taken, self._device)

    async def _infer(self, job: InferJob) -> Tensor:
        """Run a job; wait while the engine's queue is full."""
        while True:
            try:
                return await self._engine.infer(job)
            except Busy:
                await asyncio.sleep(_PAUSE_S)


def read_numbers(model: ModelPlan) -> int:
    """Return the number of values of one sample's read tokens."""
    return read_tokens(model) * anatomy(model).width


def require_own_ids(ids: list[bytes], sender: Participant) -> None:
    """Refuse ids that would give a participant more weight than its samples.

    Raises:
        InvalidField: there are more than it joined with samples, or most are repeats.
    """
    if len(ids) > sender.train_samples:
        raise InvalidField(
            "a participant cannot name more samples than it joined with",
            field="ids",
            limit=sender.train_samples,
            value=len(ids),
        )
    different = len(set(ids))
    if len(ids) > _MAX_REPEATS * different:
        raise InvalidField(
            "a participant cannot name the same samples again and again",
            field="ids",
            limit=_MAX_REPEATS * different,
            value=len(ids),
            hint="remove equal pictures",
        )


def busy_error(message: str) -> Busy:
    """Build the error for a request that waits for others."""
    return Busy(message, field="round", value=0, retry_after_s=0.2)
