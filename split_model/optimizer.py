"""Optimiser and learning rates, equal on device and server and new in each round."""

from __future__ import annotations

import math

import torch
from torch import nn

from protocol.plan import TrainingPlan


def learning_rate_factor(training: TrainingPlan, progress: float, rounds: int) -> float:
    """The factor on the learning rates after the share ``progress`` (0 … 1) of the run.

    A linear warm-up over ``warmup_rounds``, then constant, or half a cosine down to 0.
    """
    warm = min(training.warmup_rounds / rounds, 1.0)
    if progress < warm:
        return progress / warm
    if training.schedule == "constant" or warm == 1.0:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def scale_rates(training: TrainingPlan, scale: float) -> TrainingPlan:
    """Return the plan with both learning rates multiplied by ``scale``."""
    if scale == 1:
        return training
    rates = {
        name: scale * getattr(training, name)
        for name in ("prompt_learning_rate", "tail_learning_rate")
    }
    return training.model_copy(update=rates)


def make_optimizer(
    training: TrainingPlan,
    prompts: nn.Parameter | None,
    tail: nn.Module | None,
    scale: float = 1.0,
    head: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """Create an optimiser with a group for the prompts and a group for tail and head.

    Frozen parameters are left out. Each group stores its full learning rate as ``full_lr``, for
    `set_progress`. Weight decay applies to weights alone: prompts are inputs.

    Args:
        training: optimiser, learning rates, momentum and weight decay.
        prompts: None: no prompts are trained.
        tail: None: no tail is trained.
        scale: factor on both learning rates.
        head: None: no head is trained.
    """
    weights = [
        parameter
        for part in (head, tail)
        if part is not None
        for parameter in part.parameters()
        if parameter.requires_grad
    ]
    groups = [
        {
            "params": [] if prompts is None else [prompts],
            "lr": training.prompt_learning_rate * scale,
            "weight_decay": 0.0,
        },
        {
            "params": weights,
            "lr": training.tail_learning_rate * scale,
            "weight_decay": training.weight_decay,
        },
    ]
    for group in groups:
        group["full_lr"] = group["lr"]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, nesterov=training.nesterov)
    if training.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.AdamW(groups)


def set_progress(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` of its full rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
