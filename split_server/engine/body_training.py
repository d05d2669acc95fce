"""Forwards and backwards through bodies of which each participant has its own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from protocol.errors import WrongShape
from split_server.engine.answers import Answer
from split_server.engine.body_sessions import BodySession, OpenStep, Way
from split_server.engine.jobs import BodyJob
from split_server.engine.keeper import Keeper
from split_server.engine.open_sessions import OpenSessions, lost_session, require_steps
from split_server.engine.outbox import Outbox
from split_server.engine.tasks import Kind, OwnTask
from split_server.engine.tickets import Ticket, require_same
from split_server.engine.work import nbytes_of
from split_server.engine.worker import Worker
from split_server.streams import used_here


class BodyTraining:
    """The sessions of an engine whose bodies are tuned, and what becomes of their requests.

    A session has its memory from its first forward to its end: who has begun is never sent away,
    so that sessions cannot keep each other from going on. Nothing of it is joined with others.

    Methods without another word are called under the keeper's lock.
    """

    def __init__(
        self, keeper: Keeper, worker: Worker, outbox: Outbox, device: torch.device
    ) -> None:
        self._keeper = keeper
        self._worker = worker
        self._outbox = outbox
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

    def begin_forward(self, job: BodyJob) -> Ticket:
        """Put a forward to work, with number 0 of a session that begins.

        Raises:
            StepLost: it is not the next one of a session that is here.
            Busy, TooLarge, InvalidField
        """
        self._worker.require_room(nbytes_of(job.tensor))
        session = self._sessions.find(job.run, job.participant, job.session)
        if session is None and job.number == 0:
            session = self._admitted(job)
        if session is None or session.applied != job.number:
            raise lost_session(job.session)
        ticket = self._open("forward", job, session)
        self._add(job, ticket, partial(self._forward, job, session, ticket), "forward")
        return ticket

    def begin_backward(self, job: BodyJob) -> Ticket:
        """Put the backward of the open step to work.

        Raises:
            StepLost: that step is not open.
            Busy, WrongShape, InvalidField
        """
        self._worker.require_room(nbytes_of(job.tensor))
        session = self._sessions.get(job.run, job.participant, job.session)
        step = session.open
        if step is None or not job.number == step.number == session.applied:
            raise lost_session(job.session)
        _require_shape(job.tensor, step)
        ticket = self._open("backward", job, session)
        work = "backward" if session.keep == "graph" else "recompute"
        self._add(job, ticket, partial(self._backward, job, session, step, ticket), work)
        return ticket

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
        for run, participant, _ in self._sessions.expired(self._keeper.now):
            if not self._keeper.is_at_work(run, participant):
                self.release(run, participant)

    def _admitted(self, job: BodyJob) -> BodySession:
        """A new session that has its room, in the place of the participant's last one."""
        self.release(job.run, job.participant)
        shape = (job.plan.training.batch_size, *job.tensor.shape[1:])
        largest = torch.empty(shape, device="meta")
        found = self._keeper.room.ask_for_body(job.body, largest, job.plan.nbytes)
        if found is None:
            full = self._worker.busy("the memory for bodies is taken")
            full.hint = "raise engine_memory_mib where more are to be trained at once"
            raise full
        session = BodySession(job.session, job.steps, job.body, job.plan, *found)
        self._sessions.begin(job.run, job.participant, session)
        self._account()
        return session

    def _open(self, way: Way, job: BodyJob, session: BodySession) -> Ticket:
        require_steps(job.steps, session.steps)
        session.expires_at = self._keeper.expiry
        return self._keeper.open((way, job.key), job.fingerprint)

    def _add(self, job: BodyJob, ticket: Ticket, run: partial[None], work: str) -> None:
        samples, tokens, width = job.tensor.shape
        own = (job.run, job.participant, job.session)
        task = OwnTask(
            kind=Kind(job.body, int(tokens), int(width), job.leading, "graph", own),
            sender=(job.run, job.participant),
            samples=int(samples),
            nbytes=nbytes_of(job.tensor),
            fail=ticket.fail,
            run=run,
            work=work,
        )
        self._worker.add(task)

    def _account(self) -> None:
        self._keeper.room.bodies = self._sessions.nbytes

    # On the worker, without the lock

    def _forward(self, job: BodyJob, session: BodySession, ticket: Ticket) -> None:
        smashed = used_here(job.tensor).to(self._device, torch.float32)
        features, step = session.forward(job.number, smashed, job.leading)
        with self._keeper.lock:
            session.open = step
            if step.graph is not None:
                self._measured(session, step, step.graph.nbytes)
        self._answer("forward", job, session, ticket, features)

    def _backward(self, job: BodyJob, session: BodySession, step: OpenStep, ticket: Ticket) -> None:
        try:
            gradients = used_here(job.tensor).to(self._device, torch.float32)
            result = session.backward(step, gradients)
        except Exception:
            with self._keeper.lock:  # half a step may be in the weights: the device begins anew
                if self._sessions.find(job.run, job.participant, job.session) is session:
                    self.release(job.run, job.participant)
            raise
        with self._keeper.lock:
            session.applied += 1
            session.open = None
        self._answer("backward", job, session, ticket, result)

    def _answer(
        self, way: Way, job: BodyJob, session: BodySession, ticket: Ticket, result: Tensor
    ) -> None:
        def deliver(answer: Tensor) -> None:
            with self._keeper.lock:
                session.answers[way] = (job.number, Answer(answer, job.fingerprint))
                session.expires_at = self._keeper.expiry
            ticket.answer(answer)

        self._outbox.send(result, deliver, ticket.fail)

    def _measured(self, session: BodySession, step: OpenStep, nbytes: int) -> None:
        """What a step really takes is known: a session has room for the largest."""
        sizes, plan = self._keeper.room.sizes, session.plan
        sizes.learn(session.key.unstated, step.smashed, nbytes)
        per_sample = -(-nbytes // len(step.smashed))
        size = plan.training.batch_size
        answers = 2 * size * nbytes_of(step.smashed) // len(step.smashed)  # the newest, each way
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
