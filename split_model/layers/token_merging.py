"""Fewer tokens behind the cut: similar ones are merged, none is dropped.

Bipartite soft matching (ToMe, arXiv 2210.09461, section 3), once, at the cut.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merge_tokens(tokens: Tensor, keep: int) -> Tensor:
    """[B, N, D] to [B, keep, D]; each new token is the mean of those that went into it.

    Every second token looks for the most similar one among the others; the most similar pairs are
    merged. That takes as many rounds as `keep` asks for, each at most halving the tokens.
    """
    weights = torch.ones_like(tokens[..., :1])  # [B, N, 1], tokens that went into each
    while tokens.shape[1] > keep:
        tokens, weights = _merge_pairs(tokens, weights, tokens.shape[1] - keep)
    return tokens


def _merge_pairs(tokens: Tensor, weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
    sums = tokens * weights
    givers, takers = sums[:, ::2], sums[:, 1::2]  # [B, ⌈N/2⌉, D], [B, ⌊N/2⌋, D]
    own, theirs = weights[:, ::2], weights[:, 1::2]
    count = min(most, takers.shape[1])
    directions = F.normalize(tokens, dim=-1)
    similar = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # [B, ⌈N/2⌉, ⌊N/2⌋]
    best, partner = similar.max(dim=2)  # [B, ⌈N/2⌉]
    order = best.argsort(dim=1, descending=True, stable=True)
    giving, staying = order[:, :count], order[:, count:].sort(dim=1).values
    to = partner.gather(1, giving)[..., None]  # [B, count, 1]
    takers = takers.scatter_add(1, to.expand(-1, -1, sums.shape[2]), _rows(givers, giving))
    theirs = theirs.scatter_add(1, to, _rows(own, giving))
    sums = torch.cat([_rows(givers, staying), takers], dim=1)
    weights = torch.cat([_rows(own, staying), theirs], dim=1)
    return sums / weights, weights


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """[B, N, D] and places [B, k] to [B, k, D]."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2]))
