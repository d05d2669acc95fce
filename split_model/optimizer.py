"""Optimiser and learning rates of prompts and tail, alike on both ends, fresh in every round."""

from __future__ import annotations

import math

import torch
from torch import nn

from protocol.plan import TrainingPlan


def learning_rate_factor(training: TrainingPlan, progress: float, rounds: int) -> float:
    """The factor on the learning rates when ``progress`` (0 … 1) of the run is behind.

    A linear warm-up over ``warmup_rounds``, then constant or half a cosine down to 0.
    """
    warm = min(training.warmup_rounds / rounds, 1.0)
    if progress < warm:
        return progress / warm
    if training.schedule == "constant" or warm == 1.0:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def make_optimizer(
    training: TrainingPlan,
    prompts: nn.Parameter | None,
    tail: nn.Module | None,
    scale: float = 1.0,
    head: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """An optimiser with one group for the prompts and one for tail and head, any of which may lack.

    What is not trainable of tail and head is left out. Each group remembers its full rate as
    ``full_lr``; `set_progress` works from that. Weight decay is for weights alone: prompts are
    inputs.
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
