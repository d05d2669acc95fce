"""Split training with a body of one's own: one session a participant and round.

In SplitFed (Thapa et al., arXiv 2004.12088, algorithm 1) the server trains one copy of its part for
each participant, and averages them at the round's end as the participants' parts are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import split_model
from protocol.errors import NonFinite
from protocol.settings import TrainingSettings
from split_model import Body, learning_rate_factor, make_optimizer, set_progress
from split_model.model_errors import model_errors
from split_server.engine import compute
from split_server.engine.answers import Answer
from split_server.engine.bodies import BodyKey, weights_of
from split_server.engine.open_sessions import lost_session
from split_server.engine.steps import Graph
from split_server.engine.tasks import Keep

FLOAT_BYTES = 4  # these bodies are float32, whatever those are that nobody tunes
Way = Literal["forward", "backward"]


@dataclass(frozen=True)
class BodyPlan:
    """What a session needs to know of its run and round.

    Attributes:
        training: the run's settings for optimiser and rates.
        rounds: of the whole run, for the schedule.
        round: this one, from 1.
        numbers: that are tuned.
    """

    training: TrainingSettings
    rounds: int
    round: int
    numbers: int

    @property
    def nbytes(self) -> int:
        """Of the weights, their gradients, and what the optimiser remembers of each."""
        moments = 2
        if self.training.optimizer == "sgd":
            moments = 1 if self.training.momentum else 0
        return FLOAT_BYTES * self.numbers * (2 + moments)


@dataclass(frozen=True, eq=False)
class OpenStep:
    """A forward whose backward is still to come."""

    number: int
    smashed: Tensor  # [B, T, D]
    leading: int | None  # of the features' tokens: those that were wanted
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
    answers: dict[Way, tuple[int, Answer]] = field(default_factory=dict)  # the newest: number, what
    _body: Body | None = None
    _optimizer: torch.optim.Optimizer | None = None

    def forward(self, number: int, smashed: Tensor, leading: int | None) -> tuple[Tensor, OpenStep]:
        """Features [B, T', D] of smashed data [B, T, D] on the body's device, and the step.

        Raises:
            WrongShape: no number of tokens or width that this body takes.
            InvalidField: the body's weights cannot be read.
        """
        body, _ = self._made(smashed.device)
        if self.keep == "input":
            features = compute.run_inference(body, smashed, None, leading)
            return features, OpenStep(number, smashed, leading, features.shape, None)
        graph = _graph(body, smashed, leading)
        features = graph.features
        return features.detach(), OpenStep(number, smashed, leading, features.shape, graph)

    def backward(self, step: OpenStep, gradients: Tensor) -> Tensor:
        """One step of the optimiser with the gradient [B, T', D] of the step's features.

        Returns that of its smashed data [B, T, D], as they were before the step. Whether the
        weights have stayed finite is asked in the end, by `trained`.
        """
        body, optimizer = self._made(step.smashed.device)
        plan = self.plan
        progress = (plan.round - 1 + self.applied / self.steps) / plan.rounds
        set_progress(optimizer, learning_rate_factor(plan.training, progress, plan.rounds))
        graph = step.graph or _graph(body, step.smashed, step.leading)
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


def _graph(body: Body, smashed: Tensor, leading: int | None) -> Graph:
    leaf, features, nbytes = compute.run_forward(body, smashed, None, leading)
    return Graph(leaf, features, {}, nbytes, 0.0)
