"""Split training with the prompts on the server: one session a participant and round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from protocol.errors import InvalidField, NonFinite, StepLost
from protocol.settings import TrainingSettings
from split_model.schedule import learning_rate_factor, make_optimizer, set_progress
from split_server.engine.steps import StepKey


@dataclass(frozen=True)
class SessionPlan:
    """What a session needs to know of its run and round.

    Attributes:
        training: the run's settings for optimiser and rates.
        rounds: of the whole run, for the schedule.
        round: this one, from 1.
        initial: loads the prompts [L, P, D] of the global state.
        from_mean_token: shift the first layer's prompts by the mean token of the first batch.
    """

    training: TrainingSettings
    rounds: int
    round: int
    initial: Callable[[], Tensor]
    from_mean_token: bool = False


@dataclass
class Session:
    """One participant's prompts and their optimiser, in float32 beside the body.

    The gradients of ``applied`` of its ``steps`` batches have been taken in.
    """

    name: str
    steps: int
    plan: SessionPlan
    prompts: nn.Parameter  # [L, P, D]
    optimizer: torch.optim.Optimizer = field(init=False)
    applied: int = 0
    expires_at: float = math.inf  # on the monotonic clock, unless it is at its end

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.plan.training, self.prompts, None)

    @classmethod
    def begin(
        cls, name: str, steps: int, plan: SessionPlan, device: torch.device, smashed: Tensor | None
    ) -> Session:
        """A session whose prompts are those of the global state.

        Args:
            name, steps, plan: see the class.
            device: where the prompts are tuned.
            smashed: the patch tokens [B, N, D] of the first batch, where the plan asks for them.
        """
        prompts = plan.initial().to(device, torch.float32).clone()
        if plan.from_mean_token and smashed is not None:
            prompts[0] += smashed.to(torch.float32).mean(dim=(0, 1))
        return cls(name, steps, plan, nn.Parameter(prompts))

    def apply(self, gradient: Tensor) -> None:
        """One step of the optimiser with the gradient [L, P, D] of the oldest open batch.

        Nobody waits for the device to see whether it is finite: `trained` does, in the end.
        """
        plan = self.plan
        progress = (plan.round - 1 + self.applied / self.steps) / plan.rounds
        set_progress(self.optimizer, learning_rate_factor(plan.training, progress, plan.rounds))
        self.prompts.grad = gradient.to(torch.float32)
        self.optimizer.step()
        self.applied += 1

    def current(self, _smashed: Tensor | None = None) -> Tensor:
        """The prompts [L, P, D] for the next batch, on the device."""
        return self.prompts.detach()

    @property
    def nbytes(self) -> int:
        """Of the prompts and what an optimiser keeps beside them: at most two moments."""
        return 4 * self.prompts.numel() * self.prompts.element_size()

    def trained(self) -> Tensor:
        """The prompts [L, P, D] as they are now: a copy on the CPU.

        Raises:
            NonFinite: a step of the optimiser has left float32's range.
        """
        prompts = self.prompts.detach().to("cpu", copy=True)
        if not bool(torch.isfinite(prompts).all()):
            raise NonFinite("the prompts tuned on the server are not finite", field="prompts")
        return prompts


class Sessions:
    """The open session of each participant. Not thread-safe: the engine holds its lock."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str], Session] = {}

    @property
    def nbytes(self) -> int:
        return sum(session.nbytes for session in self._sessions.values())

    def begin(self, run: str, participant: str, session: Session) -> None:
        """Take the place of whatever session the participant had: it has begun anew."""
        self._sessions[run, participant] = session

    def get(self, run: str, participant: str, name: str) -> Session:
        """The session of this name.

        Raises:
            StepLost: it is not here; the server was restarted, or the round is over.
        """
        session = self._sessions.get((run, participant))
        if session is None or session.name != name:
            raise lost_session(name)
        return session

    def is_under_way(self, run: str, participant: str, name: str) -> bool:
        """Whether the session of this name has taken gradients in already."""
        session = self._sessions.get((run, participant))
        return session is not None and session.name == name and session.applied > 0

    def expired(self, now: float) -> list[tuple[tuple[str, str], Session]]:
        """The unfinished sessions whose time is up, with their run and participant."""
        return [
            (who, session)
            for who, session in self._sessions.items()
            if session.expires_at <= now and session.applied < session.steps
        ]

    def drop(self, run: str, participant: str | None = None) -> None:
        for key in [k for k in self._sessions if k[0] == run and participant in (None, k[1])]:
            del self._sessions[key]


def lost_session(name: str) -> StepLost:
    """The error that makes a device begin its round's split training anew."""
    return StepLost(
        "the server does not hold this session",
        field="session",
        value=name,
        hint="begin the round's training anew, with a new session",
    )


def require_steps(named: int, steps: int) -> None:
    """Refuse a request that names another number of steps than its session has.

    Raises:
        InvalidField: it is another.
    """
    if named != steps:
        raise InvalidField(
            "a session has a fixed number of steps", field="steps", limit=steps, value=named
        )


def batch_key(run: str, participant: str, session: str, number: int) -> StepKey:
    """The retained step of a session's batch."""
    return StepKey(run, participant, f"{session}/{number}")
