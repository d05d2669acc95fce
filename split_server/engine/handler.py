"""Job handlers: each starts the jobs of some types and manages the state that they leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from split_server.engine.api import Job
from split_server.engine.delivery import CompletionQueue
from split_server.engine.metrics import EngineFigures
from split_server.engine.requests import PendingRequest, RequestTracker
from split_server.engine.session_table import S, Session, SessionTable
from split_server.engine.worker import Worker


@dataclass(frozen=True)
class EngineParts:
    """The parts of an engine that its handlers share.

    Attributes:
        tracker: requests in progress, retained steps and cached responses.
        worker: runs tasks.
        completions: delivers results that a GPU has yet to compute.
        figures: counters and gauges.
        device: the device of the bodies.
    """

    tracker: RequestTracker
    worker: Worker
    completions: CompletionQueue
    figures: EngineFigures
    device: torch.device


J = TypeVar("J", bound=Job)


class JobHandler(ABC, Generic[J]):
    """Starts the jobs of some types. The engine calls all its methods under its lock.

    Attributes:
        job_types: the jobs' classes.
    """

    job_types: ClassVar[tuple[type[Any], ...]]

    def __init__(self, parts: EngineParts) -> None:
        self._tracker = parts.tracker
        self._worker = parts.worker
        self._completions = parts.completions
        self._device = parts.device

    def find_response(self, job: J) -> Tensor | None:
        """Return the response to an earlier, equal request, if ``job`` repeats it.

        Raises:
            IdempotencyKeyReused: another request has used the job's name.
        """
        return self._tracker.find_response(job.name, job.fingerprint)

    @abstractmethod
    def begin(self, job: J) -> PendingRequest:
        """Queue a job.

        Raises:
            StepLost: the job does not continue any step or session of this engine.
            Busy: the queue is full, or no memory is free now.
            TooLarge: the job exceeds the whole memory.
            InvalidField, WrongShape
        """

    def find_session(self, run: str, participant: str, name: str) -> Session | None:
        """Return the participant's open session of this name, if this handler has it."""
        return None

    def release(self, run: str, participant: str | None = None) -> None:
        """Free the handler's state of a run, or of one participant."""

    def sweep(self) -> None:
        """Free state whose next request has not come in time."""


HandlerFactory = Callable[[EngineParts], JobHandler[Any]]


class SessionHandler(JobHandler[J], Generic[J, S]):
    """A handler whose jobs belong to training sessions."""

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._sessions = SessionTable[S]()

    def __len__(self) -> int:
        return len(self._sessions)

    def find_session(self, run: str, participant: str, name: str) -> S | None:
        """Return the participant's open session of this name, if this handler has it."""
        return self._sessions.find(run, participant, name)

    def release(self, run: str, participant: str | None = None) -> None:
        """Drop a participant's session, or all sessions of a run."""
        self._sessions.drop(run, participant)
        self._update_memory()

    def sweep(self) -> None:
        """Drop expired sessions."""
        for run, participant, session in self._sessions.list_expired(self._tracker.now):
            if not self._retains_expired(run, participant, session):
                self.release(run, participant)

    def _retains_expired(self, run: str, participant: str, session: S) -> bool:
        """Whether an expired session stays open for now."""
        return self._tracker.has_pending(run, participant)

    def _add_session(self, run: str, participant: str, session: S) -> None:
        self._sessions.add(run, participant, session)
        self._update_memory()

    def _update_memory(self) -> None:
        """Bring the memory budget up to date after a change of the sessions or their sizes."""
        self._tracker.memory.session_bytes[type(self)] = self._sessions.nbytes
