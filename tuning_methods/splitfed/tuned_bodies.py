"""Sessions that train a body for one participant.

Source: SplitFed (arXiv 2004.12088).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from protocol.errors import NonFinite, TooLarge
from protocol.plan import TrainingPlan
from split_model.checkpoints.state import read_body
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress
from split_model.parts.body import Body
from split_model.parts.build import build_tunable_body
from split_server.engine import compute
from split_server.engine.api import JobName, StepKey, batch_key
from split_server.engine.handler import EngineParts, SessionHandler
from split_server.engine.memory import MemoryBudget
from split_server.engine.requests import PendingRequest, check_fingerprint
from split_server.engine.session_table import check_steps, lost_session_error
from split_server.engine.steps import CachedResponse, Graph
from split_server.engine.tasks import Kind, Retention, SessionTask, check_gradient_shape
from split_server.models.body_key import BodyKey, weights_of
from split_server.runtime.device import used_here

Direction = Literal["forward", "backward"]

_ITEMSIZE = torch.float32.itemsize  # tuned bodies are float32, whatever the frozen bodies are


@dataclass(frozen=True)
class BodyPlan:
    """The run's and the round's part of a body session.

    Attributes:
        training: the run's optimiser and learning rates.
        rounds: number of rounds in the run, for the schedule of the learning rate.
        round: number of this round, from 1.
        num_parameters: number of the body's tuned parameters, counted by element.
    """

    training: TrainingPlan
    rounds: int
    round: int
    num_parameters: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, their gradients and the optimiser's moments."""
        moments = 2
        if self.training.optimizer == "sgd":
            moments = 1 if self.training.momentum else 0
        return _ITEMSIZE * self.num_parameters * (2 + moments)


@dataclass(frozen=True)
class BodyJob:
    """A forward or backward of a step through the session's body.

    `protocol.messages.BodyStepMeta` explains ``number`` and ``steps``.
    """

    direction: Direction
    run: str
    participant: str
    session: str
    number: int
    steps: int
    body: BodyKey  # the session's initial body
    plan: BodyPlan
    tensor: Tensor  # forward: smashed data [B, T, D]; backward: gradients [B, T', D] of features
    fingerprint: int
    num_tokens: int | None = None

    @property
    def key(self) -> StepKey:
        return batch_key(self.run, self.participant, self.session, self.number)

    @property
    def name(self) -> JobName:
        return self.direction, self.key


@dataclass(frozen=True, eq=False)
class OpenStep:
    """A forward whose backward is still to come.

    Attributes:
        num_tokens: number of the features' tokens that were returned; None: all.
        shape: of the features, [B, T', D].
        graph: None: the forward runs again for the backward.
    """

    number: int
    smashed: Tensor  # [B, T, D]
    num_tokens: int | None
    shape: torch.Size
    graph: Graph | None


@dataclass(eq=False)
class BodySession:
    """A participant's body and its optimiser, in float32.

    The engine's lock guards all attributes; only the worker calls `forward` and `backward`.

    Attributes:
        body: the initial weights.
        retention: the part of its forward that each step retains.
        nbytes: bytes of the session, open step included.
        applied: batches whose gradients have been applied.
        expires_at: seconds on the monotonic clock.
        responses: the newest response in each direction, with its number.
    """

    name: str
    steps: int
    body: BodyKey
    plan: BodyPlan
    retention: Retention
    nbytes: int
    applied: int = 0
    open_step: OpenStep | None = None
    expires_at: float = 0.0
    responses: dict[Direction, tuple[int, CachedResponse]] = field(default_factory=dict)
    _model: Body | None = None
    _optimizer: torch.optim.Optimizer | None = None

    def forward(
        self, number: int, smashed: Tensor, num_tokens: int | None
    ) -> tuple[Tensor, OpenStep]:
        """Run a batch forward.

        Args:
            number: the batch's number.
            smashed: smashed data [B, T, D] on the body's device.
            num_tokens: number of the features' tokens to return; None: all.

        Returns:
            Features [B, T', D], and the open step.

        Raises:
            WrongShape: the body does not take this number of tokens or width.
            InvalidField: the body's weights cannot be read.
        """
        body, _ = self._load(smashed.device)
        if self.retention == "input":
            features = compute.run_inference(body, smashed, None, num_tokens)
            return features, OpenStep(number, smashed, num_tokens, features.shape, None)
        graph = _run_graph(body, smashed, num_tokens)
        features = graph.features
        return features.detach(), OpenStep(number, smashed, num_tokens, features.shape, graph)

    def backward(self, step: OpenStep, gradients: Tensor) -> Tensor:
        """Run one optimiser step with the gradients [B, T', D] of the step's features.

        Does not check that the weights stay finite: `trained_state` does, at the end.

        Returns:
            The gradient [B, T, D] of the smashed data, from the weights before the step.
        """
        body, optimizer = self._load(step.smashed.device)
        plan = self.plan
        progress = (plan.round - 1 + self.applied / self.steps) / plan.rounds
        set_progress(optimizer, learning_rate_factor(plan.training, progress, plan.rounds))
        graph = step.graph or _run_graph(body, step.smashed, step.num_tokens)
        optimizer.zero_grad()
        torch.autograd.backward(graph.features, gradients)
        if graph.leaf.grad is None:
            raise RuntimeError("the features do not depend on the smashed data")
        optimizer.step()
        optimizer.zero_grad()
        return graph.leaf.grad

    def trained_state(self) -> dict[str, Tensor]:
        """Return the body's part of a state: float32 copies on the CPU.

        Raises:
            StepLost: the session has not finished.
            NonFinite: the trained weights contain NaN or infinity.
        """
        if self._model is None or self.applied != self.steps:
            raise lost_session_error(self.name)
        state = read_body(self._model)
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFinite("the body tuned on the server is not finite", field=name)
        return state

    def _load(self, device: torch.device) -> tuple[Body, torch.optim.Optimizer]:
        if self._model is None or self._optimizer is None:
            weights: Mapping[str, Tensor] = weights_of(self.body)
            body = build_tunable_body(self.body.settings, weights, device)
            self._model, self._optimizer = body, make_optimizer(self.plan.training, None, body)
        return self._model, self._optimizer


class TunedBodies(SessionHandler[BodyJob, BodySession]):
    """Handles the steps of sessions that tune a body. Tasks of different sessions share no batch.

    A session reserves its memory from its first forward to its end. The server refuses none of its
    later requests for lack of memory, so that sessions cannot block each other.
    """

    job_types: ClassVar = (BodyJob,)

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        parts.figures.watch("sfprompt_engine_own_bodies", "Bodies that sessions tune", self.__len__)

    def find_response(self, job: BodyJob) -> Tensor | None:
        """Return the newest response of the job's direction, if ``job`` repeats its request.

        Raises:
            IdempotencyKeyReused: another request has used the job's number.
        """
        session = self._sessions.find(job.run, job.participant, job.session)
        if session is None or job.direction not in session.responses:
            return None
        number, response = session.responses[job.direction]
        if number != job.number:
            return None
        check_fingerprint(response.fingerprint, job.fingerprint, job.key)
        return response.tensor

    def begin(self, job: BodyJob) -> PendingRequest:
        """Queue a forward, which begins a session if its number is 0, or the open step's backward.

        Raises:
            StepLost: the job is not the next step of an open session.
            Busy: the queue is full, or no memory is free now.
            TooLarge: the session exceeds the whole memory.
            InvalidField: the number of steps differs from the session's.
            WrongShape: the gradients do not have the features' shape.
        """
        self._worker.check_queue((job.key.run, job.key.participant), job.tensor.nbytes)
        return self._begin_forward(job) if job.direction == "forward" else self._begin_backward(job)

    def _begin_forward(self, job: BodyJob) -> PendingRequest:
        session = self._sessions.find(job.run, job.participant, job.session)
        if session is None and job.number == 0:
            session = self._begin_session(job)
        if session is None or session.applied != job.number:
            raise lost_session_error(job.session)
        pending = self._track(job, session)
        self._queue(job, pending, partial(self._forward, job, session, pending), "forward")
        return pending

    def _begin_backward(self, job: BodyJob) -> PendingRequest:
        session = self._sessions.get(job.run, job.participant, job.session)
        step = session.open_step
        if step is None or not job.number == step.number == session.applied:
            raise lost_session_error(job.session)
        check_gradient_shape(job.tensor, step.shape)
        pending = self._track(job, session)
        work = "backward" if session.retention == "graph" else "recompute"
        self._queue(job, pending, partial(self._backward, job, session, step, pending), work)
        return pending

    def _begin_session(self, job: BodyJob) -> BodySession:
        """Reserve memory for a session; it replaces the participant's earlier session.

        Raises:
            Busy: no memory is free now.
            TooLarge: the session exceeds the whole memory.
        """
        self.release(job.run, job.participant)
        shape = (job.plan.training.batch_size, *job.tensor.shape[1:])
        largest = torch.empty(shape, device="meta")
        choice = _choose_retention(self._tracker.memory, job.body, largest, job.plan.nbytes)
        if choice is None:
            error = self._worker.busy_error("the memory for tuned bodies is full")
            error.hint = "raise engine_memory_mib to train more bodies at once"
            raise error
        session = BodySession(job.session, job.steps, job.body, job.plan, *choice)
        self._add_session(job.run, job.participant, session)
        return session

    def _track(self, job: BodyJob, session: BodySession) -> PendingRequest:
        check_steps(job.steps, session.steps)
        session.expires_at = self._tracker.expiry
        return self._tracker.track(job.name, job.fingerprint)

    def _queue(self, job: BodyJob, pending: PendingRequest, run: partial[None], work: str) -> None:
        samples, tokens, width = job.tensor.shape
        session = (job.run, job.participant, job.session)
        task = SessionTask(
            kind=Kind(job.body, int(tokens), int(width), job.num_tokens, "graph", session),
            sender=(job.run, job.participant),
            samples=int(samples),
            nbytes=job.tensor.nbytes,
            fail=pending.fail,
            run=run,
            work=work,
        )
        self._worker.add(task)

    # On the worker's thread, without the lock

    def _forward(self, job: BodyJob, session: BodySession, pending: PendingRequest) -> None:
        smashed = used_here(job.tensor).to(self._device, torch.float32)
        features, step = session.forward(job.number, smashed, job.num_tokens)
        with self._tracker.lock:
            session.open_step = step
            if step.graph is not None:
                self._learn_size(session, step, step.graph.nbytes)
        self._respond(job, session, pending, features)

    def _backward(
        self, job: BodyJob, session: BodySession, step: OpenStep, pending: PendingRequest
    ) -> None:
        try:
            gradients = used_here(job.tensor).to(self._device, torch.float32)
            result = session.backward(step, gradients)
        except Exception:
            with self._tracker.lock:  # the optimiser step may be incomplete: the device restarts
                if self._sessions.find(job.run, job.participant, job.session) is session:
                    self.release(job.run, job.participant)
            raise
        with self._tracker.lock:
            session.applied += 1
            session.open_step = None
        self._respond(job, session, pending, result)

    def _respond(
        self, job: BodyJob, session: BodySession, pending: PendingRequest, result: Tensor
    ) -> None:
        def deliver(tensor: Tensor) -> None:
            with self._tracker.lock:
                response = CachedResponse(tensor, job.fingerprint)
                session.responses[job.direction] = (job.number, response)
                session.expires_at = self._tracker.expiry
            pending.respond(tensor)

        self._completions.send(result, deliver, pending.fail)

    def _learn_size(self, session: BodySession, step: OpenStep, nbytes: int) -> None:
        """Size a session's memory for its largest batch, from a measured step's graph."""
        plan = session.plan
        self._tracker.memory.sizes.learn(session.body.unstated, step.smashed, nbytes)
        per_sample = -(-nbytes // len(step.smashed))
        size = plan.training.batch_size
        responses = 2 * size * step.smashed.nbytes // len(step.smashed)  # in each direction
        session.nbytes = plan.nbytes + responses + max(per_sample * size, nbytes)
        self._update_memory()


def _run_graph(body: Body, smashed: Tensor, num_tokens: int | None) -> Graph:
    leaf, features, nbytes = compute.run_forward(body, smashed, None, num_tokens)
    return Graph(leaf, features, {}, nbytes, 0.0)


def _choose_retention(
    memory: MemoryBudget, body: BodyKey, largest: Tensor, weight_bytes: int
) -> tuple[Retention, int] | None:
    """Choose what each step of a body session retains.

    Args:
        memory: the engine's memory budget.
        body: the session's initial body.
        largest: a batch [B, T, D] of the largest size, without data.
        weight_bytes: of the weights, their gradients and the optimiser, all in float32.

    Returns:
        The retention and the session's bytes; None if they do not fit now.

    Raises:
        TooLarge: the session exceeds the whole budget.
    """
    options: list[tuple[Retention, int]] = []
    batch = largest.numel() * _ITEMSIZE
    fixed = weight_bytes + 2 * batch  # a response in each direction, for repeated requests
    if memory.backward != "recompute":
        kind = body.unstated
        size = memory.sizes.estimate(kind, body, largest, _ITEMSIZE)
        if not memory.sizes.is_known(kind, largest):
            size = min(size, memory.limit - fixed)  # an estimate may be too high
        options.append(("graph", max(fixed + batch, fixed + size)))
    if memory.backward != "retained":
        options.append(("input", fixed + batch))
    for retention, need in options:
        if need <= memory.limit and memory.fits(need):
            return retention, need
    smallest = min(need for _, need in options)
    if smallest > memory.limit:
        raise TooLarge(
            "a tuned body, its optimiser and one step exceed the engine's memory",
            field="tune_body",
            limit=memory.limit,
            value=smallest,
            hint="raise engine_memory_mib",
        )
    return None
