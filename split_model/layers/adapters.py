"""LoRA: a change of low rank beside the attention's queries and values, tuned on the device.

LoRA (arXiv 2106.09685, section 4): W x becomes W x + U D x, with D [r, D] drawn at random and U
[D, r] zero at first. The scale alpha / r is 1: the learning rate stands for it.
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

_MARK = "lora_"  # before the last part of its tensors' names, which timm's model does not have

_QUERY, _VALUE = "q", "v"

_PLACES = {_QUERY: 0, _VALUE: 2}  # of the three rows of blocks in timm's joint matrix


class LoraQkv(nn.Linear):
    """timm's joint projection D -> 3 D, with a change of rank r of its queries and its values.

    On the meta device until its part is filled; `weight` and `bias` keep timm's names.
    """

    def __init__(self, width: int, outputs: int, bias: bool, rank: int) -> None:
        super().__init__(width, outputs, bias=bias, device="meta")
        for role in _PLACES:
            down = nn.Parameter(torch.empty(rank, width, device="meta"))
            up = nn.Parameter(torch.empty(outputs // 3, rank, device="meta"))
            self.register_parameter(f"{_MARK}{role}_down", down)
            self.register_parameter(f"{_MARK}{role}_up", up)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] to queries, keys and values, [B, T, 3 D]."""
        joint = F.linear(tokens, self.weight, self.bias)
        query, key, value = joint.chunk(3, dim=-1)
        query = query + self._change(tokens, _QUERY)
        return torch.cat([query, key, value + self._change(tokens, _VALUE)], dim=-1)

    def _change(self, tokens: Tensor, role: str) -> Tensor:
        down = self.get_parameter(f"{_MARK}{role}_down")
        return F.linear(F.linear(tokens, down), self.get_parameter(f"{_MARK}{role}_up"))


def is_lora(name: str) -> bool:
    """Whether a tensor of this name, with any prefix, is one of LoRA's."""
    return name.rsplit(".", 1)[-1].startswith(_MARK)


def lora_blocks(settings: ModelPlan) -> set[int]:
    """The numbers of the blocks that get it: all, or `lora_ends` at either end of the model."""
    depth, ends = anatomy(settings).depth, settings.lora_ends
    every = set(range(depth))
    return every if ends == 0 else {one for one in every if one < ends or one >= depth - ends}


def add_lora(settings: ModelPlan, blocks: nn.ModuleDict) -> None:
    """Replace the projections of these blocks, keyed by their numbers in the model.

    Raises `ModelPlanError` for attention that has no joint projection of its own.
    """
    chosen = lora_blocks(settings)
    for number, block in blocks.items():
        if int(number) not in chosen:
            continue
        attention: Any = getattr(block, "attn", None)
        if type(attention) is not timm.layers.Attention:
            limit = f"another than 'lora' for the attention of {settings.backbone}"
            raise ModelPlanError("tune", limit, settings.tune)
        own = attention.qkv
        attention.qkv = LoraQkv(
            own.in_features, own.out_features, own.bias is not None, settings.lora_rank
        )


def initial_lora(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """First values of one tensor: the way up is zero, so that tuning begins at the backbone."""
    if name.endswith("_up"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[1])


def merged(
    settings: ModelPlan, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[ModelPlan, dict[str, Tensor], dict[str, Tensor]]:
    """LoRA taken into the weights: the settings, weights and state of a model without it.

    Args:
        settings: with ``tune`` = "lora".
        weights: of the backbone, by timm's names; those that change are new tensors.
        state: what was tuned, by the names of a state.
    """
    made = {name: weights[name] for name in weights}
    for name in state:
        if not (is_lora(name) and name.endswith("_down")):
            continue
        path, own = name.split(".", 1)[1].rsplit(".", 1)
        place = _PLACES[own.removeprefix(_MARK).removesuffix("_down")]
        change = state[name.removesuffix("down") + "up"] @ state[name]  # [D, D]
        weight = made[f"{path}.weight"].clone()
        rows = change.shape[0]
        weight[place * rows : (place + 1) * rows] += change.to(weight.dtype)
        made[f"{path}.weight"] = weight
    rest = {name: tensor for name, tensor in state.items() if not is_lora(name)}
    return settings.replace(tune="classifier"), made, rest


STANDARD_DEVIATION = 0.02


class Adapter(nn.Module):
    """D -> W -> D with a GELU between, beside a path that changes nothing.

    One for all blocks, as FedPEFT has it (arXiv 2210.01708); the form is that of Houlsby et al.
    (arXiv 1902.00751). On the meta device until its part is filled.
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
    """First values of one tensor: the way up is zero, so that tuning begins at the backbone."""
    if not name.endswith("down.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * STANDARD_DEVIATION
