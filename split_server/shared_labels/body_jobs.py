"""Jobs with a body of the run's own: the engine gives them their turns, and shares no batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from split_server.engine.api import JobName, StepKey
from split_server.engine.handler import EngineParts, JobHandler
from split_server.engine.requests import PendingRequest
from split_server.engine.tasks import Kind, SessionTask
from split_server.models.body_key import BodyKey
from split_server.runtime.device import used_here

SENDER = "server"  # in the place of a participant: no participant has this id


@dataclass(frozen=True)
class OwnBodyJob:
    """One batch through a run's own body.

    Attributes:
        run: its id.
        number: of the job, so that no two have the same name.
        body: the frozen body that the own one began as.
        smashed: smashed data, [B, T, D].
        compute: called on the worker with the smashed data on the body's device, in float32.
        reserved: bytes of the own body with its optimiser and one step, while the run has it.
    """

    run: str
    number: int
    body: BodyKey
    smashed: Tensor
    compute: Callable[[Tensor], Tensor]
    reserved: int

    @property
    def key(self) -> StepKey:
        return StepKey(self.run, SENDER, f"own/{self.number}")

    @property
    def name(self) -> JobName:
        return "own", self.key

    @property
    def fingerprint(self) -> int:
        return 0  # no job is repeated


class OwnBodies(JobHandler[OwnBodyJob]):
    """Handles jobs with bodies of runs' own; each run has at most one, which it releases."""

    job_types: ClassVar = (OwnBodyJob,)

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._reserved: dict[str, int] = {}
        parts.figures.watch("sfprompt_engine_run_bodies", "Bodies of runs' own", self.__len__)

    def __len__(self) -> int:
        return len(self._reserved)

    def find_response(self, job: OwnBodyJob) -> Tensor | None:
        """Return none: each job is sent once."""
        return None

    def begin(self, job: OwnBodyJob) -> PendingRequest:
        """Queue a job.

        Raises:
            Busy: the queue is full, or there is no memory for another body now.
        """
        sender = (job.run, SENDER)
        self._worker.check_queue(sender, job.smashed.nbytes)
        memory = self._tracker.memory
        # Even one that exceeds the whole memory goes on once it has all of it.
        if job.run not in self._reserved and memory.taken and not memory.fits(job.reserved):
            raise self._worker.busy_error("the memory for tuned bodies is full")
        self._reserved[job.run] = job.reserved
        self._update_memory()
        pending = self._tracker.track(None, 0)
        samples, tokens, width = job.smashed.shape
        task = SessionTask(
            kind=Kind(job.body, int(tokens), int(width), None, "graph", (*sender, "own")),
            sender=sender,
            samples=int(samples),
            nbytes=job.smashed.nbytes,
            fail=pending.fail,
            run=partial(self._run, job, pending),
            work="backward",
        )
        self._worker.add(task)
        return pending

    def release(self, run: str, participant: str | None = None) -> None:
        """Give the memory of a run's own body back."""
        if participant in (None, SENDER):
            self._reserved.pop(run, None)
            self._update_memory()

    def _update_memory(self) -> None:
        self._tracker.memory.session_bytes[type(self)] = sum(self._reserved.values())

    def _run(self, job: OwnBodyJob, pending: PendingRequest) -> None:
        smashed = used_here(job.smashed).to(self._device, torch.float32)
        self._completions.send(job.compute(smashed), pending.respond, pending.fail)
