"""Forwards and backwards through bodies of which each participant has its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

import split_model
from protocol.errors import NonFinite, WrongShape
from split_model import Body, learning_rate_factor, make_optimizer, set_progress
from split_model.errors import model_errors
from split_server.engine import compute
from split_server.engine.api import BodyJob, BodyPlan
from split_server.engine.delivery import CompletionQueue
from split_server.engine.requests import PendingRequest, RequestTracker, require_same
from split_server.engine.session_table import OpenSessions, lost_session, require_steps
from split_server.engine.steps import CachedResponse, Graph
from split_server.engine.tasks import Keep, Kind, OwnTask
from split_server.engine.worker import Worker
from split_server.models.body_key import BodyKey, weights_of
from split_server.runtime.device import used_here

Way = Literal["forward", "backward"]


@dataclass(frozen=True, eq=False)
class OpenStep:
    """A forward whose backward is still to come."""

    number: int
    smashed: Tensor  # [B, T, D]
    num_tokens: int | None  # of the features' tokens: those that were wanted
    shape: torch.Size  # of the features, [B, T', D]
    graph: Graph | None  # none: the forward is run again for the backward


@dataclass(eq=False)
class BodySession:
    """One participant's body and its optimiser, in float32.

    ``applied`` of its ``steps`` batches have been brought into the weights. `forward` and
    `backward` are for the engine's worker; everything else is guarded by the engine's lock.
    """

    name: str
    steps: int
    key: BodyKey  # the weights that it begins with
    plan: BodyPlan
    keep: Keep
    nbytes: int  # the memory that it may take, its one open step included
    applied: int = 0
    open: OpenStep | None = None
    expires_at: float = 0.0  # on the monotonic clock
    answers: dict[Way, tuple[int, CachedResponse]] = field(
        default_factory=dict
    )  # the newest: number, what
    _body: Body | None = None
    _optimizer: torch.optim.Optimizer | None = None

    def forward(
        self, number: int, smashed: Tensor, num_tokens: int | None
    ) -> tuple[Tensor, OpenStep]:
        """Features [B, T', D] of smashed data [B, T, D] on the body's device, and the step.

        Raises:
            WrongShape: no number of tokens or width that this body takes.
            InvalidField: the body's weights cannot be read.
        """
        body, _ = self._made(smashed.device)
        if self.keep == "input":
            features = compute.run_inference(body, smashed, None, num_tokens)
            return features, OpenStep(number, smashed, num_tokens, features.shape, None)
        graph = _graph(body, smashed, num_tokens)
        features = graph.features
        return features.detach(), OpenStep(number, smashed, num_tokens, features.shape, graph)

    def backward(self, step: OpenStep, gradients: Tensor) -> Tensor:
        """One step of the optimiser with the gradient [B, T', D] of the step's features.

        Returns that of its smashed data [B, T, D], as they were before the step. Whether the
        weights have stayed finite is asked in the end, by `trained`.
        """
        body, optimizer = self._made(step.smashed.device)
        plan = self.plan
        progress = (plan.round - 1 + self.applied / self.steps) / plan.rounds
        set_progress(optimizer, learning_rate_factor(plan.training, progress, plan.rounds))
        graph = step.graph or _graph(body, step.smashed, step.num_tokens)
        optimizer.zero_grad()
        torch.autograd.backward(graph.features, gradients)
        if graph.leaf.grad is None:
            raise RuntimeError("the features do not depend on the smashed data")
        optimizer.step()
        optimizer.zero_grad()
        return graph.leaf.grad

    def trained(self) -> dict[str, Tensor]:
        """The body's part of a state: float32 copies on the CPU.

        Raises:
            StepLost: not all of its batches have been brought in.
            NonFinite: a step of the optimiser has left float32's range.
        """
        if self._body is None or self.applied != self.steps:
            raise lost_session(self.name)
        state = split_model.read_body(self._body)
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFinite("the body tuned on the server is not finite", field=name)
        return state

    def _made(self, device: torch.device) -> tuple[Body, torch.optim.Optimizer]:
        if self._body is None or self._optimizer is None:
            with model_errors():
                weights: Mapping[str, Tensor] = weights_of(self.key)
                body = split_model.build_tunable_body(self.key.settings, weights, device)
            self._body, self._optimizer = body, make_optimizer(self.plan.training, None, body)
        return self._body, self._optimizer


def _graph(body: Body, smashed: Tensor, num_tokens: int | None) -> Graph:
    leaf, features, nbytes = compute.run_forward(body, smashed, None, num_tokens)
    return Graph(leaf, features, {}, nbytes, 0.0)


class BodyTraining:
    """The sessions of an engine whose bodies are tuned, and what becomes of their requests.

    A session has its memory from its first forward to its end: who has begun is never sent away,
    so that sessions cannot keep each other from going on. Nothing of it is joined with others.

    Methods without another word are called under the tracker's lock.
    """

    def __init__(
        self,
        tracker: RequestTracker,
        worker: Worker,
        completions: CompletionQueue,
        device: torch.device,
    ) -> None:
        self._tracker = tracker
        self._worker = worker
        self._completions = completions
        self._device = device
        self._sessions = OpenSessions[BodySession]()

    def __len__(self) -> int:
        return len(self._sessions)

    def known(self, way: Way, job: BodyJob) -> Tensor | None:
        """What this very request was answered with, if it is a repeat of the newest one.

        Raises:
            IdempotencyKeyReused: its number was used for another request.
        """
        session = self._sessions.find(job.run, job.participant, job.session)
        number, answer = session.answers.get(way, (None, None)) if session else (None, None)
        if answer is None or number != job.number:
            return None
        require_same(answer.fingerprint, job.fingerprint, job.key)
        return answer.tensor

    def begin_forward(self, job: BodyJob) -> PendingRequest:
        """Put a forward to work, with number 0 of a session that begins.

        Raises:
            StepLost: it is not the next one of a session that is here.
            Busy, TooLarge, InvalidField
        """
        self._worker.require_room(job.tensor.nbytes)
        session = self._sessions.find(job.run, job.participant, job.session)
        if session is None and job.number == 0:
            session = self._admitted(job)
        if session is None or session.applied != job.number:
            raise lost_session(job.session)
        pending = self._open("forward", job, session)
        self._add(job, pending, partial(self._forward, job, session, pending), "forward")
        return pending

    def begin_backward(self, job: BodyJob) -> PendingRequest:
        """Put the backward of the open step to work.

        Raises:
            StepLost: that step is not open.
            Busy, WrongShape, InvalidField
        """
        self._worker.require_room(job.tensor.nbytes)
        session = self._sessions.get(job.run, job.participant, job.session)
        step = session.open
        if step is None or not job.number == step.number == session.applied:
            raise lost_session(job.session)
        _require_shape(job.tensor, step)
        pending = self._open("backward", job, session)
        work = "backward" if session.keep == "graph" else "recompute"
        self._add(job, pending, partial(self._backward, job, session, step, pending), work)
        return pending

    def finished(self, run: str, participant: str, name: str) -> BodySession:
        """A session that has come to its end.

        Raises:
            StepLost: it is not here, or not at its end.
        """
        return self._sessions.finished(run, participant, name)

    def release(self, run: str, participant: str | None) -> None:
        self._sessions.drop(run, participant)
        self._account()

    def sweep(self) -> None:
        """Free the sessions of participants that were not heard of in time."""
        for run, participant, _ in self._sessions.expired(self._tracker.now):
            if not self._tracker.is_at_work(run, participant):
                self.release(run, participant)

    def _admitted(self, job: BodyJob) -> BodySession:
        """A new session that has its room, in the place of the participant's last one."""
        self.release(job.run, job.participant)
        shape = (job.plan.training.batch_size, *job.tensor.shape[1:])
        largest = torch.empty(shape, device="meta")
        found = self._tracker.memory.ask_for_body(job.body, largest, job.plan.nbytes)
        if found is None:
            full = self._worker.busy_error("the memory for bodies is taken")
            full.hint = "raise engine_memory_mib where more are to be trained at once"
            raise full
        session = BodySession(job.session, job.steps, job.body, job.plan, *found)
        self._sessions.begin(job.run, job.participant, session)
        self._account()
        return session

    def _open(self, way: Way, job: BodyJob, session: BodySession) -> PendingRequest:
        require_steps(job.steps, session.steps)
        session.expires_at = self._tracker.expiry
        return self._tracker.open((way, job.key), job.fingerprint)

    def _add(self, job: BodyJob, pending: PendingRequest, run: partial[None], work: str) -> None:
        samples, tokens, width = job.tensor.shape
        own = (job.run, job.participant, job.session)
        task = OwnTask(
            kind=Kind(job.body, int(tokens), int(width), job.num_tokens, "graph", own),
            sender=(job.run, job.participant),
            samples=int(samples),
            nbytes=job.tensor.nbytes,
            fail=pending.fail,
            run=run,
            work=work,
        )
        self._worker.add(task)

    def _account(self) -> None:
        self._tracker.memory.bodies = self._sessions.nbytes

    # On the worker, without the lock

    def _forward(self, job: BodyJob, session: BodySession, pending: PendingRequest) -> None:
        smashed = used_here(job.tensor).to(self._device, torch.float32)
        features, step = session.forward(job.number, smashed, job.num_tokens)
        with self._tracker.lock:
            session.open = step
            if step.graph is not None:
                self._measured(session, step, step.graph.nbytes)
        self._answer("forward", job, session, pending, features)

    def _backward(
        self, job: BodyJob, session: BodySession, step: OpenStep, pending: PendingRequest
    ) -> None:
        try:
            gradients = used_here(job.tensor).to(self._device, torch.float32)
            result = session.backward(step, gradients)
        except Exception:
            with self._tracker.lock:  # half a step may be in the weights: the device begins anew
                if self._sessions.find(job.run, job.participant, job.session) is session:
                    self.release(job.run, job.participant)
            raise
        with self._tracker.lock:
            session.applied += 1
            session.open = None
        self._answer("backward", job, session, pending, result)

    def _answer(
        self, way: Way, job: BodyJob, session: BodySession, pending: PendingRequest, result: Tensor
    ) -> None:
        def deliver(answer: Tensor) -> None:
            with self._tracker.lock:
                session.answers[way] = (job.number, CachedResponse(answer, job.fingerprint))
                session.expires_at = self._tracker.expiry
            pending.answer(answer)

        self._completions.send(result, deliver, pending.fail)

    def _measured(self, session: BodySession, step: OpenStep, nbytes: int) -> None:
        """What a step really takes is known: a session has room for the largest."""
        sizes, plan = self._tracker.memory.sizes, session.plan
        sizes.learn(session.key.unstated, step.smashed, nbytes)
        per_sample = -(-nbytes // len(step.smashed))
        size = plan.training.batch_size
        answers = 2 * size * step.smashed.nbytes // len(step.smashed)  # the newest, each way
        session.nbytes = plan.nbytes + answers + max(per_sample * size, nbytes)
        self._account()


def _require_shape(gradients: Tensor, step: OpenStep) -> None:
    if gradients.shape != step.shape:
        raise WrongShape(
            "the gradient has another shape than the features of its step",
            field="gradients",
            limit=list(step.shape),
            value=list(gradients.shape),
        )
