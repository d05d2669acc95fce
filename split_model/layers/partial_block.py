"""A transformer block that computes the output of some tokens and only attends to the others.

Nobody reads a block's output for deep prompts, since the next block replaces them, nor the last
block's output for tokens that the tail drops. Such a token needs only its key and its value, a
sixth of the block's work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from split_model.backbone.libraries import timm
from split_model.layers.bfloat16 import BFloat16Linear, mixed_linear


def supports_partial_run(block: nn.Module) -> bool:
    """Whether `run_for_tokens` can run the block: timm's plain block with its plain attention."""
    attention: Any = getattr(block, "attn", None)
    # Exact types: a subclass or a replaced layer may compute something else.
    return (
        type(block) is timm.models.vision_transformer.Block
        and type(attention) is timm.models.vision_transformer.Attention
        and type(attention.qkv) in (nn.Linear, BFloat16Linear)
        and getattr(attention, "gate", None) is None
    )


def run_for_tokens(block: Any, tokens: Tensor, others: Tensor | None, count: int) -> Tensor:
    """The block's output for the first ``count`` tokens.

    Args:
        block: `supports_partial_run` is true of it.
        tokens: [B, T, D].
        others: [B, P, D], further tokens to attend to; attention ignores their order.
        count: at most T.

    Returns:
        [B, count, D].
    """
    context = tokens if others is None else torch.cat([tokens, others], dim=1)  # (B, T + P, D)
    attended = _attend(block.attn, block.norm1(context), count)
    updated = tokens[:, :count] + block.drop_path1(block.ls1(attended))
    result: Tensor = updated + block.drop_path2(block.ls2(block.mlp(block.norm2(updated))))
    return result


def _attend(attention: Any, normed: Tensor, count: int) -> Tensor:
    """Attention of the first ``count`` tokens of [B, T, D] to all T tokens, [B, count, D]."""
    batch, length, _ = normed.shape
    heads, width = attention.num_heads, attention.qkv.out_features // 3
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query_bias, rest_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    queries = mixed_linear(normed[:, :count], weight[:width], query_bias)  # (B, count, H·d)
    rest = mixed_linear(normed, weight[width:], rest_bias)  # (B, T, 2·H·d)
    query = queries.reshape(batch, count, heads, -1).transpose(1, 2)  # (B, H, count, d)
    key, value = rest.reshape(batch, length, 2, heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
    query, key = attention.q_norm(query), attention.k_norm(key)
    mixed = F.scaled_dot_product_attention(query, key, value)
    joined = mixed.transpose(1, 2).reshape(batch, count, width)  # (B, count, H·d)
    result: Tensor = attention.proj_drop(attention.proj(attention.norm(joined)))
    return result
