"""Rotary and relative positions that leave prompt tokens untouched."""

from typing import Any, cast

import torch
from torch import Tensor

from split_model.backbone.libraries import timm


def padded_rope(table: Tensor, prompts: int) -> Tensor:
    """A rotary table [..., N, 2·d] (sine, then cosine) with identity rows for leading prompts.

    Returns [..., prompts + N, 2·d].
    """
    if not prompts:
        return table
    rows = table.new_zeros(*table.shape[:-2], prompts, table.shape[-1])
    rows[..., table.shape[-1] // 2 :] = 1.0  # cosine 1, sine 0: no rotation
    return torch.cat([rows, table], dim=-2)  # (..., P + N, 2·d)


def padded_bias(bias: Tensor, prefix: int, prompts: int) -> Tensor:
    """An attention bias [1, H, n, n] with zero rows and columns for prompts behind the prefix.

    Returns [1, H, n + prompts, n + prompts].
    """
    for axis in (-2, -1) if prompts else ():
        shape = list(bias.shape)
        shape[axis] = prompts
        first = bias.narrow(axis, 0, prefix)
        rest = bias.narrow(axis, prefix, bias.shape[axis] - prefix)
        bias = torch.cat([first, bias.new_zeros(shape), rest], dim=axis)
    return bias


class _SharedBiasAttention(timm.models.beit.Attention):  # type: ignore[misc]
    """timm's Beit attention, given its own bias from outside, where prompts can be padded in.

    timm adds the own table at its fixed size wherever the attribute is set. Here the attribute
    reads None, while the parameter of that name stays registered, with its name in the state.
    """

    @property
    def relative_position_bias_table(self) -> None:
        return None

    def own_bias(self) -> Tensor | None:
        """[1, H, n, n] from this block's table, or None where it has none."""
        table: Tensor | None = self._parameters.get("relative_position_bias_table")
        if table is None:
            return None
        index = cast(Tensor, self.relative_position_index)
        bias = table[index.reshape(-1)].view(*index.shape, -1)  # (n, n, H)
        return bias.permute(2, 0, 1)[None]


def use_shared_bias(attention: Any) -> None:
    """Turn a timm Beit attention, in place, into one that takes all its bias from its caller."""
    attention.__class__ = _SharedBiasAttention
