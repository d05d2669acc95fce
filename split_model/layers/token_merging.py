"""Token merging at the cut: similar tokens are averaged, none is dropped.

Source: bipartite soft matching (ToMe, arXiv 2210.09461, section 3), applied once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merge_tokens(tokens: Tensor, keep: int) -> Tensor:
    """Merge [B, N, D] to [B, keep, D]; a merged token is the mean of its original tokens.

    Tokens at even positions are matched with their most similar token at an odd position, and the
    most similar pairs are merged. Repeated until `keep` tokens remain; a pass removes at most half.
    """
    weights = torch.ones_like(tokens[..., :1])  # [B, N, 1], number of original tokens
    while tokens.shape[1] > keep:
        tokens, weights = _merge_pairs(tokens, weights, tokens.shape[1] - keep)
    return tokens


def _merge_pairs(tokens: Tensor, weights: Tensor, max_pairs: int) -> tuple[Tensor, Tensor]:
    sums = tokens * weights
    givers, takers = sums[:, ::2], sums[:, 1::2]  # [B, ⌈N/2⌉, D], [B, ⌊N/2⌋, D]
    giver_weights, taker_weights = weights[:, ::2], weights[:, 1::2]
    count = min(max_pairs, takers.shape[1])
    directions = F.normalize(tokens, dim=-1)
    similar = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # [B, ⌈N/2⌉, ⌊N/2⌋]
    best, partner = similar.max(dim=2)  # [B, ⌈N/2⌉]
    order = best.argsort(dim=1, descending=True, stable=True)
    giving, staying = order[:, :count], order[:, count:].sort(dim=1).values
    to = partner.gather(1, giving)[..., None]  # [B, count, 1]
    takers = takers.scatter_add(1, to.expand(-1, -1, sums.shape[2]), _rows(givers, giving))
    taker_weights = taker_weights.scatter_add(1, to, _rows(giver_weights, giving))
    sums = torch.cat([_rows(givers, staying), takers], dim=1)
    weights = torch.cat([_rows(giver_weights, staying), taker_weights], dim=1)
    return sums / weights, weights


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows of [B, N, D] at the positions [B, k]: [B, k, D]."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2]))
