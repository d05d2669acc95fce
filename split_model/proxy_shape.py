"""The shape of a proxy: a backbone with narrower MLPs, or with fewer blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from split_model.libraries import timm
from split_model.settings import SplitSettings, SplitSettingsError

_PRUNING = 4  # 768 of 3072 in ViT-B (FedPFT, arXiv 2404.11536)


def proxy_width(settings: SplitSettings, whole: int) -> int:
    """The neurons of a narrower MLP that has so many in the backbone."""
    return settings.proxy_width or max(1, whole // _PRUNING)


def kept_blocks(settings: SplitSettings, depth: int) -> list[int]:
    """Which of the backbone's ``depth`` blocks the proxy has, in order.

    All but where blocks are dropped. Then `proxy_ends` stay at either end, and of those between
    them so many at even distances that `proxy_blocks` stay in all (offsite-tuning's emulator,
    arXiv 2302.04870, section 3).

    Raises `SplitSettingsError`.
    """
    ends = settings.proxy_ends
    count = settings.proxy_blocks or max(1, 2 * ends, depth // 2)
    if 2 * ends > depth:
        raise SplitSettingsError("proxy_ends", f"at most half of the {depth} blocks", ends)
    if settings.proxy != "dropped":
        return list(range(depth))
    if not max(1, 2 * ends) <= count <= depth:
        limit = (
            f"from {max(1, 2 * ends)} (two ends of {ends}) to the {depth} blocks of the backbone"
        )
        raise SplitSettingsError("proxy_blocks", limit, count)
    between = evenly(range(ends, depth - ends), count - 2 * ends)
    return [*range(ends), *between, *range(depth - ends, depth)]


def evenly(blocks: range, count: int) -> list[int]:
    """So many of these blocks, each the middle one of its share."""
    return [blocks[(2 * place + 1) * len(blocks) // (2 * count)] for place in range(count)]


def pruned_blocks(settings: SplitSettings, depth: int) -> range:
    """The blocks whose MLPs are narrower in the proxy: all but `proxy_ends` at either end.

    Raises `SplitSettingsError`.
    """
    kept_blocks(settings, depth)
    if settings.proxy != "pruned":
        return range(0)
    return range(settings.proxy_ends, depth - settings.proxy_ends)


def shape_proxy(settings: SplitSettings, model: Any) -> None:
    """Turn timm's whole model on the meta device into the proxy's, in place.

    Blocks are numbered anew from 0, so that the proxy is a model like any other.

    Raises `SplitSettingsError`, also for a backbone that no proxy is made of.
    """
    if settings.proxy == "none":
        return
    depth = len(model.blocks)
    if not _is_plain(model):
        limit = f"'none' for {settings.backbone}: its blocks are not a plain vision transformer's"
        raise SplitSettingsError("proxy", limit, settings.proxy)
    for number in pruned_blocks(settings, depth):
        _narrow(settings, model.blocks[number].mlp)
    model.blocks = nn.Sequential(*(model.blocks[one] for one in kept_blocks(settings, depth)))


def _is_plain(model: Any) -> bool:
    """Whether blocks know nothing of their number, and their MLPs are two layers."""
    models, layers = timm.models, timm.layers
    plain = (models.VisionTransformer, models.deit.VisionTransformerDistilled)
    return type(model) in plain and all(
        type(block) is models.vision_transformer.Block
        and type(block.mlp) is layers.Mlp
        and isinstance(block.mlp.fc1, nn.Linear)
        and isinstance(block.mlp.norm, nn.Identity)
        for block in model.blocks
    )


def _narrow(settings: SplitSettings, mlp: Any) -> None:
    whole = mlp.fc1.out_features
    width = proxy_width(settings, whole)
    if width > whole:
        limit = f"at most the {whole} neurons of an MLP of {settings.backbone}"
        raise SplitSettingsError("proxy_width", limit, width)
    ins, outs = mlp.fc1, mlp.fc2
    mlp.fc1 = nn.Linear(ins.in_features, width, bias=ins.bias is not None, device="meta")
    mlp.fc2 = nn.Linear(width, outs.out_features, bias=outs.bias is not None, device="meta")
