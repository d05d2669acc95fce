"""Soft prompts: their shape, their initial values, and where they join the tokens."""

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, body_blocks

STANDARD_DEVIATION = 0.02  # as timm initialises class and position tokens


def prompt_shape(settings: ModelPlan) -> tuple[int, ...]:
    """The shape of a run's prompts.

    Returns:
        (P, D) for shallow prompts at the input, else (L, P, D) for L insertions. Deep prompts join
        before each block of the head (`prompt_at` = input) or of the body (`prompt_at` = cut).
    """
    single = (settings.prompt_count, anatomy(settings).width)
    deep = settings.prompt_depth == "deep"
    if settings.prompt_at == "input":
        return (settings.cut, *single) if deep else single
    layers = len(body_blocks(settings)) if deep else 1
    return (layers, *single)


def initial_prompts(settings: ModelPlan, seed: int) -> Tensor:
    """Normal values with deviation 0.02, float32 on the CPU, of the shape `prompt_shape`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompt_shape(settings), generator=generator) * STANDARD_DEVIATION


def spread_prompts(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Expand prompts [P, D] or [B, P, D] to [B, P, D], in the dtype of ``tokens`` [B, T, D]."""
    if prompts.ndim == 2:
        prompts = prompts.expand(tokens.shape[0], -1, -1)  # (B, P, D)
    return prompts.to(tokens.dtype)


def insert_prompts(tokens: Tensor, prompts: Tensor, prefix: int) -> Tensor:
    """Insert prompts [P, D] or [B, P, D] behind the prefix: [B, prefix + P + N, D]."""
    spread = spread_prompts(prompts, tokens)
    return torch.cat([tokens[:, :prefix], spread, tokens[:, prefix:]], dim=1)


def drop_prompts(tokens: Tensor, count: int, prefix: int) -> Tensor:
    """Remove the ``count`` prompts from [B, prefix + P + N, D]: [B, prefix + N, D]."""
    return torch.cat([tokens[:, :prefix], tokens[:, prefix + count :]], dim=1)
