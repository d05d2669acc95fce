"""Soft prompts: their shape and their first values."""

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, body_blocks

STANDARD_DEVIATION = 0.02  # timm's own for class and position tokens


def prompt_shape(settings: ModelPlan) -> tuple[int, ...]:
    """(P, D) where prompts join the input alone; else (L, P, D), L insertions.

    Deep ones join ahead of each block: of the head where they begin at the input, of the body
    where they begin at the cut.
    """
    one = (settings.prompt_count, anatomy(settings).width)
    deep = settings.prompt_depth == "deep"
    if settings.prompt_at == "input":
        return (settings.cut, *one) if deep else one
    layers = len(body_blocks(settings)) if deep else 1
    return (layers, *one)


def initial_prompts(settings: ModelPlan, seed: int) -> Tensor:
    """First values, float32 on the CPU, of `prompt_shape`: normal with deviation 0.02."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompt_shape(settings), generator=generator) * STANDARD_DEVIATION


def spread_prompts(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Prompts [P, D] or [B, P, D] beside each sample of [B, T, D]: [B, P, D], of its type."""
    if prompts.ndim == 2:
        prompts = prompts.expand(tokens.shape[0], -1, -1)  # (B, P, D)
    return prompts.to(tokens.dtype)


def insert_prompts(tokens: Tensor, prompts: Tensor, prefix: int) -> Tensor:
    """[B, prefix + N, D] and prompts [P, D] or [B, P, D] joined to [B, prefix + P + N, D]."""
    spread = spread_prompts(prompts, tokens)
    return torch.cat([tokens[:, :prefix], spread, tokens[:, prefix:]], dim=1)


def drop_prompts(tokens: Tensor, count: int, prefix: int) -> Tensor:
    """[B, prefix + P + N, D] without its ``count`` prompts: [B, prefix + N, D]."""
    return torch.cat([tokens[:, :prefix], tokens[:, prefix + count :]], dim=1)
