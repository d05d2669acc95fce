"""Split training with the prompts on the server: one session a participant and round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from protocol.errors import NonFinite
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
    expires_at: float = math.inf  # on the monotonic clock

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


def batch_key(run: str, participant: str, session: str, number: int) -> StepKey:
    """The retained step of a session's batch."""
    return StepKey(run, participant, f"{session}/{number}")
