"""Soft prompts: their shape and their first values."""

import torch
from torch import Tensor

from split_model.architecture import anatomy, body_blocks
from split_model.settings import SplitSettings

STANDARD_DEVIATION = 0.02  # timm's own for class and position tokens


def prompt_shape(settings: SplitSettings) -> tuple[int, ...]:
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


def initial_prompts(settings: SplitSettings, seed: int) -> Tensor:
    """First values, float32 on the CPU, of `prompt_shape`: normal with deviation 0.02."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompt_shape(settings), generator=generator) * STANDARD_DEVIATION
