"""Layers added to a frozen backbone and tuned on the device: LoRA and a bottleneck adapter.

LoRA (arXiv 2106.09685, section 4) replaces W x by W x + U D x, where D [r, D] starts random and
U [D, r] starts at zero. The scale alpha / r is 1, since the learning rate has the same effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_model.backbone.libraries import timm
from split_model.errors import ModelPlanError

_PREFIX = "lora_"  # of the last component of a tensor's name; no name in timm begins so

_QUERY, _VALUE = "q", "v"

_ROWS = {_QUERY: 0, _VALUE: 2}  # which third of the rows of timm's joint matrix


class LoraQkv(nn.Linear):
    """timm's joint projection D -> 3 D plus a rank-r change of queries and values.

    On the meta device until the part is filled; `weight` and `bias` keep timm's names.
    """

    def __init__(self, width: int, outputs: int, bias: bool, rank: int) -> None:
        super().__init__(width, outputs, bias=bias, device="meta")
        for role in _ROWS:
            down = nn.Parameter(torch.empty(rank, width, device="meta"))
            up = nn.Parameter(torch.empty(outputs // 3, rank, device="meta"))
            self.register_parameter(f"{_PREFIX}{role}_down", down)
            self.register_parameter(f"{_PREFIX}{role}_up", up)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] to queries, keys and values, [B, T, 3 D]."""
        joint = F.linear(tokens, self.weight, self.bias)
        query, key, value = joint.chunk(3, dim=-1)
        query = query + self._change(tokens, _QUERY)
        return torch.cat([query, key, value + self._change(tokens, _VALUE)], dim=-1)

    def _change(self, tokens: Tensor, role: str) -> Tensor:
        down = self.get_parameter(f"{_PREFIX}{role}_down")
        return F.linear(F.linear(tokens, down), self.get_parameter(f"{_PREFIX}{role}_up"))


def is_lora(name: str) -> bool:
    """Whether the tensor of this name, with any prefix, belongs to LoRA."""
    return name.rsplit(".", 1)[-1].startswith(_PREFIX)


def lora_blocks(settings: ModelPlan) -> set[int]:
    """The numbers of the blocks with LoRA: all, or the `lora_ends` blocks at either end."""
    depth, ends = anatomy(settings).depth, settings.lora_ends
    if ends == 0:
        return set(range(depth))
    return {number for number in range(depth) if number < ends or number >= depth - ends}


def add_lora(settings: ModelPlan, blocks: nn.ModuleDict) -> None:
    """Replace the projections of the chosen blocks, in place.

    Args:
        settings: with ``tune`` = "lora".
        blocks: keyed by their numbers in the whole model.

    Raises:
        ModelPlanError: the backbone's attention has no joint projection.
    """
    chosen = lora_blocks(settings)
    for number, block in blocks.items():
        if int(number) not in chosen:
            continue
        attention: Any = getattr(block, "attn", None)
        if type(attention) is not timm.layers.Attention:
            limit = f"not lora: the attention of {settings.backbone} has no joint projection"
            raise ModelPlanError("tune", limit, settings.tune)
        joint = attention.qkv
        attention.qkv = LoraQkv(
            joint.in_features, joint.out_features, joint.bias is not None, settings.lora_rank
        )


def initial_lora(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The initial value of a LoRA tensor; up is zero, so that tuning begins at the backbone."""
    if name.endswith("_up"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[1])


def merged(
    settings: ModelPlan, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[ModelPlan, dict[str, Tensor], dict[str, Tensor]]:
    """Add LoRA's changes to the weights.

    Args:
        settings: with ``tune`` = "lora".
        weights: the backbone's, by timm's names; they are not changed in place.
        state: the tuned tensors, by the names of a state.

    Returns:
        Plan, weights and state of an equal model without LoRA.
    """
    result = {name: weights[name] for name in weights}
    for name in state:
        if not (is_lora(name) and name.endswith("_down")):
            continue
        path, tensor_name = name.split(".", 1)[1].rsplit(".", 1)
        third = _ROWS[tensor_name.removeprefix(_PREFIX).removesuffix("_down")]
        change = state[name.removesuffix("down") + "up"] @ state[name]  # [D, D]
        weight = result[f"{path}.weight"].clone()
        rows = change.shape[0]
        weight[third * rows : (third + 1) * rows] += change.to(weight.dtype)
        result[f"{path}.weight"] = weight
    rest = {name: tensor for name, tensor in state.items() if not is_lora(name)}
    return settings.replace(tune="classifier"), result, rest


STANDARD_DEVIATION = 0.02


class Adapter(nn.Module):
    """A bottleneck D -> W -> D with a GELU and a residual connection (Houlsby, arXiv 1902.00751).

    All blocks share it, as in FedPEFT (arXiv 2210.01708). On the meta device until the part is
    filled.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner, device="meta")
        self.up = nn.Linear(inner, width, device="meta")

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        changed: Tensor = self.up(F.gelu(self.down(tokens)))
        return tokens + changed


def initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The initial value of an adapter's tensor; up is zero, so that it begins as the identity."""
    if not name.endswith("down.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * STANDARD_DEVIATION
