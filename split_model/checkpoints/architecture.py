"""Describe a timm backbone for devices without timm (`protocol.architecture`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from protocol.architecture import Architecture, Rotary
from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, skeleton
from split_model.backbone.libraries import timm

_DIGITS = 10  # of an angle: more than the float32 tables have that timm computes

_ACTIVATIONS: dict[str, Literal["gelu", "gelu-tanh", "gelu-quick", "silu"]] = {
    "GELU": "gelu",
    "GELUTanh": "gelu-tanh",
    "QuickGELU": "gelu-quick",
    "SiLU": "silu",
}

_TURN = 2 * math.pi

_BLOCKS = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm")

_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")

_NORMS = ("LayerNorm", "RmsNorm")

_MLPS = ("Mlp", "GluMlp", "GeGluMlp", "SwiGLU")

_PREFIX: tuple[Literal["cls_token", "dist_token", "reg_token"], ...] = (
    "cls_token",
    "dist_token",
    "reg_token",
)


class Indescribable(Exception):
    """The backbone has a layer that `Architecture` does not describe."""


def describe(settings: ModelPlan) -> Architecture | None:
    """Return the architecture of a plan's backbone; None: a device needs timm to compute its head.

    That is so for convolutional stems, and for parallel and differential attention.
    """
    try:
        return _describe(settings)
    except Indescribable:
        return None


def _describe(settings: ModelPlan) -> Architecture:
    model: Any = skeleton(settings)
    embedding, block, sizes = model.patch_embed, model.blocks[0], anatomy(settings)
    if type(embedding) is not timm.layers.PatchEmbed or getattr(model, "dynamic_img_pad", False):
        raise Indescribable(type(embedding).__name__)
    if getattr(model, "attn_mask", None) is not None:
        raise Indescribable("attn_mask")
    _one_of(_BLOCKS, model.blocks)
    _one_of(_ATTENTIONS, (block.attn for block in model.blocks))
    _one_of(_MLPS, (block.mlp for block in model.blocks))
    norms, epsilon = _norm_of(model.blocks)
    first_norms, first_epsilon = _norm_of(
        [module for module in (embedding.norm, getattr(model, "norm_pre", None)) if module]
    )
    kinds = {*norms, *first_norms}
    if len(kinds) != 1:
        raise Indescribable(f"norms {sorted(kinds)}")
    rows, columns = embedding.grid_size
    prefix = tuple(name for name in _PREFIX if getattr(model, name, None) is not None)
    return Architecture(
        depth=sizes.depth,
        width=sizes.width,
        patch=tuple(embedding.patch_size),
        grid=(rows, columns),
        prefix=prefix,
        prefix_tokens=sizes.prefix,
        positions=_positions(model),
        heads=block.attn.num_heads,
        norm="rms" if kinds == {"RmsNorm"} else "layer",
        epsilon=epsilon or first_epsilon or 1e-6,
        first_epsilon=first_epsilon or epsilon or 1e-6,
        activation=_ACTIVATIONS[_only(type(block.mlp.act).__name__ for block in model.blocks)],
        gate=_only(_gate(block.mlp) for block in model.blocks),
        norm_after=type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm"),
        rotary=_rotary(settings, model),
        relative=sizes.family == "relative",
    )


def _one_of(allowed: tuple[str, ...], modules: Iterable[nn.Module]) -> None:
    unknown = {type(module).__name__ for module in modules} - set(allowed)
    if unknown:
        raise Indescribable(", ".join(sorted(unknown)))


def _only(values: Iterable[Any]) -> Any:
    distinct = set(values)
    if len(distinct) != 1:
        raise Indescribable(f"blocks differ in {sorted(map(str, distinct))}")
    return distinct.pop()


def _norm_of(modules: Iterable[nn.Module]) -> tuple[set[str], float | None]:
    """Return the kinds of the norms in modules, and their only epsilon; None: there are none."""
    norms = [
        norm
        for module in modules
        for norm in module.modules()
        if type(norm).__name__.startswith(_NORMS)
    ]
    kinds = {"RmsNorm" if "Rms" in type(norm).__name__ else "LayerNorm" for norm in norms}
    return kinds, _only(norm.eps for norm in norms) if norms else None


def _positions(model: Any) -> Literal["none", "patches", "all"]:
    if model.pos_embed is None:
        return "none"
    return "patches" if getattr(model, "no_embed_class", False) else "all"


def _gate(mlp: Any) -> Literal["none", "first", "last"]:
    if type(mlp).__name__ == "Mlp":
        return "none"
    # GluMlp chooses its half; the others activate the first.
    return "last" if getattr(mlp, "gate_last", False) else "first"


def _rotary(settings: ModelPlan, model: Any) -> Rotary | None:
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    layout = _only(
        "half" if getattr(block.attn, "rotate_half", False) else "interleaved"
        for block in model.blocks
    )
    if getattr(model, "rope_mixed", False):
        is_xy = getattr(rope, "grid_indexing", "ij") == "xy"
        return Rotary(layout=layout, learned="column-row" if is_xy else "row-column")
    rows, columns = model.patch_embed.grid_size
    angles = _angles(rope, (rows, columns), layout)  # [rows, columns, pairs]
    start = angles[0, 0]
    row, column = _step(angles[:, 0] - start), _step(angles[0] - start)
    return Rotary(layout=layout, start=_rounded(start), row=_rounded(row), column=_rounded(column))


def _angles(rope: Any, grid: tuple[int, int], layout: str) -> Tensor:
    """Return by how much timm turns each pair of each patch, [rows, columns, pairs], float64."""
    on_cpu = copy.deepcopy(rope).to_empty(device="cpu")
    on_cpu.init_non_persistent_buffers()
    cached = getattr(on_cpu, "feat_shape", None) is not None
    table = on_cpu.get_embed() if cached else on_cpu.get_embed(shape=grid)  # [N, 2 d]
    sines, cosines = table.double().chunk(2, dim=-1)
    angles = torch.atan2(sines, cosines).reshape(*grid, -1)
    pairs = angles.shape[-1] // 2
    return angles[..., :pairs] if layout == "half" else angles[..., ::2]


def _step(angles: Tensor) -> Tensor:
    """Return the angle [pairs] whose multiples are these [n, pairs], up to whole turns.

    A longer way tells the angle more exactly, once a shorter one has told the turns.
    """
    step = torch.zeros_like(angles[0])
    for place in range(1, len(angles)):
        step = step + torch.remainder(angles[place] - place * step + math.pi, _TURN) / place
        step = step - math.pi / place
    return step


def _rounded(angles: Tensor) -> tuple[float, ...]:
    return tuple(round(angle, _DIGITS) for angle in angles.tolist())
