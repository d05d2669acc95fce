"""The body's outputs at several depths, pooled, and the linear tail that reads them.

One transformer block decides little alone: class token, mean and spread of the patch tokens after
several blocks carry more than the last class token (Head2Toe, arXiv 2201.03529).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protocol.plan import ModelPlan
from split_model.backbone.architecture import Anatomy, anatomy, body_blocks
from split_model.parts.tail import Tail

_EPSILON = 1e-6


@lru_cache(maxsize=64)
def read_blocks(settings: ModelPlan) -> tuple[int, ...]:
    """The numbers of the blocks after which the tail reads: evenly spaced, the last included."""
    blocks = list(body_blocks(settings))
    count = min(settings.depths, len(blocks))
    return tuple(blocks[-(-len(blocks) * place // count) - 1] for place in range(1, count + 1))


def read_tokens(settings: ModelPlan) -> int:
    """The number of tokens that the body returns for a tail that reads several depths."""
    return len(read_blocks(settings)) * _tokens_per_depth(anatomy(settings))


def feature_shape(settings: ModelPlan) -> tuple[int, int]:
    """The shape [T', D'] of one sample's features on the wire, with ``depths``."""
    numbers = read_tokens(settings) * anatomy(settings).width
    return 1, min(settings.rank, numbers) if settings.rank else numbers


def pool_depth(tokens: Tensor, sizes: Anatomy) -> Tensor:
    """Summarise a block's output [B, T, D]: class token, mean and spread of the patch tokens.

    Tokens are normalised first, without the weights of the backbone's last norm: a linear tail
    absorbs them. A backbone without class token gives mean and spread alone.

    Returns:
        [B, 3, D] or [B, 2, D].
    """
    normed = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=_EPSILON)
    patches = normed[:, -sizes.patches :]  # (B, N, D): prompts stand before them
    variance = patches.var(dim=1, unbiased=False)
    read = [patches.mean(dim=1), (variance + _EPSILON).sqrt()]
    if _tokens_per_depth(sizes) == 3:
        read.insert(0, normed[:, 0])
    return torch.stack(read, dim=1).to(tokens.dtype)


def _tokens_per_depth(sizes: Anatomy) -> int:
    return 3 if sizes.prefix else 2


class DepthTail(Tail):
    """A linear classifier of features [B, T', D'] in the shape of `feature_shape`."""

    def __init__(self, settings: ModelPlan) -> None:
        nn.Module.__init__(self)
        self.settings = settings
        self.sizes = anatomy(settings)
        self.trunk = nn.Module()
        tokens, width = feature_shape(settings)
        self.trunk.head = nn.Linear(tokens * width, settings.num_classes, device="meta")
        self.blocks = nn.ModuleDict()
        super().train(False)

    @property
    def num_tokens(self) -> int | None:
        return feature_shape(self.settings)[0]

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.trunk.head(features.flatten(1))
        return logits

    def pool(self, features: Tensor) -> Tensor:
        return features.flatten(1)


def make_tail(settings: ModelPlan) -> Tail:
    """The tail that the plan asks for, on the meta device."""
    return DepthTail(settings) if settings.depths else Tail(settings)
