"""Where soft prompts stand among the tokens: behind the class and register tokens."""

import torch
from torch import Tensor


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
