"""A block run for some of its tokens alone; the others are there to be attended to.

What a block makes of a token that nobody reads is thrown away: of deep prompts, which the next
block has its own of, and in the last block of all tokens but those that the tail reads. Such a
token needs its key and its value, a sixth of a block's work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from split_model.backbone.libraries import timm
from split_model.layers.bfloat16 import BFloat16Linear, mixed_linear


def supports_partial_run(block: nn.Module) -> bool:
    """Whether `run_for_tokens` knows this block: timm's plain one, with timm's plain attention."""
    attention: Any = getattr(block, "attn", None)
    # Exact types: a subclass, or a layer put in its place, may compute otherwise.
    return (
        type(block) is timm.models.vision_transformer.Block
        and type(attention) is timm.models.vision_transformer.Attention
        and type(attention.qkv) in (nn.Linear, BFloat16Linear)
        and getattr(attention, "gate", None) is None
    )


def run_for_tokens(block: Any, tokens: Tensor, others: Tensor | None, count: int) -> Tensor:
    """The block's output for the first ``count`` of the tokens, [B, count, D].

    Args:
        block: one that `supports_partial_run` knows.
        tokens: [B, T, D].
        others: [B, P, D], more tokens to attend to. Attention does not mind their place.
        count: at most T.
    """
    known = tokens if others is None else torch.cat([tokens, others], dim=1)  # (B, T + P, D)
    asking = tokens[:, :count]
    asking = asking + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(known), count)))
    result: Tensor = asking + block.drop_path2(block.ls2(block.mlp(block.norm2(asking))))
    return result


def _attend(attention: Any, normed: Tensor, count: int) -> Tensor:
    """Attention of the first ``count`` tokens of [B, T, D] to all of them, [B, count, D]."""
    batch, length, _ = normed.shape
    heads, width = attention.num_heads, attention.qkv.out_features // 3
    weight, bias = attention.qkv.weight, attention.qkv.bias
    own, shared = (None, None) if bias is None else (bias[:width], bias[width:])
    asked = mixed_linear(normed[:, :count], weight[:width], own)  # (B, count, H·d)
    held = mixed_linear(normed, weight[width:], shared)  # (B, T, 2·H·d)
    query = asked.reshape(batch, count, heads, -1).transpose(1, 2)  # (B, H, count, d)
    key, value = held.reshape(batch, length, 2, heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
    query, key = attention.q_norm(query), attention.k_norm(key)
    mixed = F.scaled_dot_product_attention(query, key, value)
    joined = mixed.transpose(1, 2).reshape(batch, count, width)  # (B, count, H·d)
    result: Tensor = attention.proj_drop(attention.proj(attention.norm(joined)))
    return result
