"""Rotary and relative positions that leave prompt tokens untouched."""

from typing import Any, cast

import torch
from torch import Tensor

from split_model.backbone.libraries import timm


def padded_rope(table: Tensor, prompts: int) -> Tensor:
    """Add identity rows for leading prompts to a rotary table.

    Args:
        table: [..., N, 2·d], sines then cosines.
        prompts: their number.

    Returns:
        [..., prompts + N, 2·d].
    """
    if not prompts:
        return table
    rows = table.new_zeros(*table.shape[:-2], prompts, table.shape[-1])
    rows[..., table.shape[-1] // 2 :] = 1.0  # cosine 1, sine 0: no rotation
    return torch.cat([rows, table], dim=-2)  # (..., P + N, 2·d)


def padded_bias(bias: Tensor, prefix: int, prompts: int) -> Tensor:
    """Add zero rows and columns for prompts behind the prefix to an attention bias.

    Args:
        bias: [1, H, n, n].
        prefix: class, distillation and register tokens, at the front.
        prompts: their number.

    Returns:
        [1, H, n + prompts, n + prompts].
    """
    for axis in (-2, -1) if prompts else ():
        shape = list(bias.shape)
        shape[axis] = prompts
        first = bias.narrow(axis, 0, prefix)
        rest = bias.narrow(axis, prefix, bias.shape[axis] - prefix)
        bias = torch.cat([first, bias.new_zeros(shape), rest], dim=axis)
    return bias


class _SharedBiasAttention(timm.models.beit.Attention):  # type: ignore[misc]
    """timm's Beit attention whose caller passes the position bias, padded for prompts.

    timm adds the block's table, of a fixed size, wherever the attribute is set. Here the attribute
    reads None, while the parameter stays registered under its name in the state.
    """

    @property
    def relative_position_bias_table(self) -> None:
        return None

    def block_bias(self) -> Tensor | None:
        """The bias from this block's table, [1, H, n, n]; None if the block has no table."""
        table: Tensor | None = self._parameters.get("relative_position_bias_table")
        if table is None:
            return None
        index = cast(Tensor, self.relative_position_index)
        bias = table[index.reshape(-1)].view(*index.shape, -1)  # (n, n, H)
        return bias.permute(2, 0, 1)[None]


def use_shared_bias(attention: Any) -> None:
    """Make a timm Beit attention take its whole position bias from the caller, in place."""
    attention.__class__ = _SharedBiasAttention
