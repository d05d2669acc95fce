"""The timm architectures that can be cut, and their skeletons on the meta device."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from protocol.plan import ModelPlan
from split_model.backbone.libraries import timm
from split_model.errors import ModelPlanError, UnsupportedBackboneError

_PRUNING_FACTOR = 4  # 768 of 3072 neurons in ViT-B (FedPFT, arXiv 2404.11536)


def proxy_width(settings: ModelPlan, full_width: int) -> int:
    """The number of neurons of a pruned MLP that has ``full_width`` in the backbone."""
    return settings.proxy_width or max(1, full_width // _PRUNING_FACTOR)


def kept_blocks(settings: ModelPlan, depth: int) -> list[int]:
    """The numbers of the backbone's ``depth`` blocks that the proxy keeps, in order.

    A dropped proxy keeps `proxy_ends` blocks at either end and evenly spaced blocks between them,
    `proxy_blocks` in total; any other keeps all.

    Raises:
        ModelPlanError: the backbone does not have that many blocks.

    Source: the emulator of offsite-tuning (arXiv 2302.04870, section 3).
    """
    ends = settings.proxy_ends
    count = settings.proxy_blocks or max(1, 2 * ends, depth // 2)
    if 2 * ends > depth:
        raise ModelPlanError("proxy_ends", f"at most half of the {depth} blocks", ends)
    if settings.proxy != "dropped":
        return list(range(depth))
    if not max(1, 2 * ends) <= count <= depth:
        limit = f"from {max(1, 2 * ends)} (two ends of {ends}) to the backbone's {depth} blocks"
        raise ModelPlanError("proxy_blocks", limit, count)
    middle = evenly(range(ends, depth - ends), count - 2 * ends)
    return [*range(ends), *middle, *range(depth - ends, depth)]


def evenly(blocks: range, count: int) -> list[int]:
    """Choose ``count`` evenly spaced blocks: the middle block of each of ``count`` equal shares."""
    return [blocks[(2 * place + 1) * len(blocks) // (2 * count)] for place in range(count)]


def pruned_blocks(settings: ModelPlan, depth: int) -> range:
    """The blocks with pruned MLPs: all but `proxy_ends` at either end; none if not pruned.

    Raises:
        ModelPlanError: the ends overlap.
    """
    kept_blocks(settings, depth)
    if settings.proxy != "pruned":
        return range(0)
    return range(settings.proxy_ends, depth - settings.proxy_ends)


def shape_proxy(settings: ModelPlan, model: Any) -> None:
    """Turn timm's whole model on the meta device into the proxy, in place.

    Its blocks are numbered from 0, so that the proxy is a model like any other.

    Raises:
        ModelPlanError: the plan does not fit, or this backbone has no proxy.
    """
    if settings.proxy == "none":
        return
    depth = len(model.blocks)
    if not _is_plain(model):
        limit = f"none for {settings.backbone}: its blocks are not a plain vision transformer's"
        raise ModelPlanError("proxy", limit, settings.proxy)
    for number in pruned_blocks(settings, depth):
        _narrow(settings, model.blocks[number].mlp)
    model.blocks = nn.Sequential(*(model.blocks[number] for number in kept_blocks(settings, depth)))


def _is_plain(model: Any) -> bool:
    """Whether blocks do not depend on their number and have MLPs of two layers."""
    models, layers = timm.models, timm.layers
    plain = (models.VisionTransformer, models.deit.VisionTransformerDistilled)
    return type(model) in plain and all(
        type(block) is models.vision_transformer.Block
        and type(block.mlp) is layers.Mlp
        and isinstance(block.mlp.fc1, nn.Linear)
        and isinstance(block.mlp.norm, nn.Identity)
        for block in model.blocks
    )


def _narrow(settings: ModelPlan, mlp: Any) -> None:
    first, second = mlp.fc1, mlp.fc2
    full_width = first.out_features
    width = proxy_width(settings, full_width)
    if width > full_width:
        limit = f"at most the {full_width} neurons of an MLP of {settings.backbone}"
        raise ModelPlanError("proxy_width", limit, width)
    mlp.fc1 = nn.Linear(first.in_features, width, bias=first.bias is not None, device="meta")
    mlp.fc2 = nn.Linear(width, second.out_features, bias=second.bias is not None, device="meta")


# All architectures that these modules of timm register are of the classes in `family_of`.
_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "vitamin", "eva", "beit")


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The sizes of a cut backbone that device and server compute with."""

    depth: int  # number of blocks
    width: int  # features per token
    prefix: int  # class, distillation and register tokens, at the front
    patches: int  # image tokens behind the cut
    family: str  # "plain", "rotary" (Eva) or "relative" (Beit)
    num_tokens: int | None  # number of leading feature tokens that the tail reads; None: all
    averaged: bool = False  # the tail reads the mean of the image tokens, before any norm

    @property
    def tokens(self) -> int:
        """Number of tokens of one image without prompts."""
        return self.prefix + self.patches


@functools.cache
def supported_backbones() -> list[str]:
    """The sorted names of all architectures that can be cut."""
    return sorted({name for module in _MODULES for name in timm.list_models(module=module)})


def family_of(model: nn.Module) -> str | None:
    """How a timm model's blocks learn positions; None: the model cannot be cut."""
    models = timm.models
    # Exact types: a subclass may change the forward pass.
    if type(model) in (models.VisionTransformer, models.deit.VisionTransformerDistilled):
        return "plain"
    if type(model) is models.eva.Eva:
        return "rotary"
    if type(model) is models.beit.Beit:
        return "relative"
    return None


def check_backbone(backbone: str) -> None:
    """Raise `UnsupportedBackboneError` unless timm has a supported backbone of this name."""
    if ":" in backbone or not timm.is_model(backbone):
        raise UnsupportedBackboneError(backbone, "timm has no architecture of that name")
    architecture = backbone.split(".", 1)[0]
    module = timm.model_entrypoint(architecture).__module__
    built_in = module.startswith("timm.models.")
    if built_in and architecture not in supported_backbones():
        raise UnsupportedBackboneError(backbone, f"it comes from {module}")


def create(settings: ModelPlan, num_classes: int, **arguments: Any) -> nn.Module:
    """Create timm's model in eval mode on torch's default device.

    Args:
        settings: the model's plan.
        num_classes: of the classifier; 0: none.
        arguments: further arguments of `timm.create_model`.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        ModelPlanError: timm refuses the arguments.
    """
    check_backbone(settings.backbone)
    arguments = {**dict(settings.model_overrides), **arguments}
    try:
        model: nn.Module = timm.create_model(
            settings.backbone, img_size=settings.image_size, num_classes=num_classes, **arguments
        )
    except (AssertionError, TypeError, ValueError) as error:
        limit = f"what {settings.backbone} accepts at {settings.image_size} pixels ({error})"
        field = "model_overrides" if settings.model_overrides else "image_size"
        raise ModelPlanError(field, limit, getattr(settings, field)) from error
    if family_of(model) is None:
        raise UnsupportedBackboneError(settings.backbone, f"it is a {type(model).__name__}")
    return model.eval()


def skeleton(settings: ModelPlan, blocks: range | None = None) -> nn.Module:
    """Copy timm's model with the plan's classifier on the meta device: shapes without memory.

    Args:
        settings: the model's plan.
        blocks: the blocks to copy; identities replace the others. None: all.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        ModelPlanError: the plan does not fit the backbone.
    """
    model: Any = _checked_model(settings)
    absent = [
        block
        for number, block in enumerate(model.blocks)
        if blocks is not None and number not in blocks
    ]
    copied: nn.Module = copy.deepcopy(model, {id(block): nn.Identity() for block in absent})
    return copied


@functools.lru_cache(maxsize=16)
def _pristine(settings: ModelPlan) -> nn.Module:
    # Meta tensors take no memory, and building a model takes ten times as long as copying it.
    if settings.proxy != "none":
        plain = settings.replace(proxy="none", proxy_ends=1, proxy_width=0, proxy_blocks=0)
        model = copy.deepcopy(_pristine(plain))
        with torch.device("meta"):
            shape_proxy(settings, model)
        return model
    with torch.device("meta"):
        return create(settings, settings.num_classes)


@functools.lru_cache(maxsize=64)
def anatomy(settings: ModelPlan) -> Anatomy:
    """The sizes of the plan's backbone; raises as `skeleton` does."""
    sizes = _measure(_checked_model(settings))
    keep = settings.keep_tokens
    return dataclasses.replace(sizes, patches=keep) if keep else sizes


def _checked_model(settings: ModelPlan) -> nn.Module:
    uncut = ModelPlan(
        backbone=settings.backbone,
        image_size=settings.image_size,
        cut=0,
        num_classes=settings.num_classes,
        model_overrides=settings.model_overrides,
        prompt_count=0,
        proxy=settings.proxy,
        proxy_ends=settings.proxy_ends,
        proxy_width=settings.proxy_width,
        proxy_blocks=settings.proxy_blocks,
    )
    pristine = _pristine(uncut)
    _check(settings, _measure(pristine))
    _check_image(settings, pristine)
    return pristine


def body_blocks(settings: ModelPlan) -> range:
    """The numbers of the body's blocks in the whole model; raises as `skeleton` does."""
    return range(settings.cut, anatomy(settings).depth - settings.tail_blocks)


def _measure(model: Any) -> Anatomy:
    distilled = hasattr(model, "head_dist")
    plain_pool = getattr(model, "attn_pool", None) is None
    by_token = model.global_pool == "token" and plain_pool
    norm_follows = isinstance(model.norm, nn.Identity)
    return Anatomy(
        depth=len(model.blocks),
        width=int(model.embed_dim),
        prefix=int(model.num_prefix_tokens),
        patches=int(model.patch_embed.num_patches),
        family=family_of(model) or "",
        num_tokens=(2 if distilled else 1) if by_token else None,
        averaged=model.global_pool == "avg" and plain_pool and norm_follows,
    )


def _check(settings: ModelPlan, sizes: Anatomy) -> None:
    if sizes.patches < 1:
        raise ModelPlanError("image_size", "at least one patch", settings.image_size)
    if settings.tail_blocks > sizes.depth:
        limit = f"at most the {sizes.depth} blocks of {settings.backbone}"
        raise ModelPlanError("tail_blocks", limit, settings.tail_blocks)
    last = sizes.depth - settings.tail_blocks
    if settings.cut > last:
        limit = f"from 0 to {last} (depth {sizes.depth} less {settings.tail_blocks} tail blocks)"
        raise ModelPlanError("cut", limit, settings.cut)
    if settings.keep_tokens:
        if sizes.family != "plain":
            limit = f"0 for {settings.backbone}: its blocks depend on positions"
            raise ModelPlanError("keep_tokens", limit, settings.keep_tokens)
        if settings.keep_tokens > sizes.patches:
            limit = f"at most the {sizes.patches} patches of an image"
            raise ModelPlanError("keep_tokens", limit, settings.keep_tokens)
    if settings.tune_body and settings.cut == last:
        raise ModelPlanError("tune_body", "false where the body has no blocks", True)
    if settings.prompt_count and settings.prompt_at == "cut":
        # Prompts act by attention only: without a block behind them they have no effect.
        if settings.prompt_depth == "deep" and settings.cut == last:
            limit = "shallow where the body has no blocks"
            raise ModelPlanError("prompt_depth", limit, settings.prompt_depth)
        if settings.cut == sizes.depth:
            limit = "input where no block follows the cut"
            raise ModelPlanError("prompt_at", limit, settings.prompt_at)


def _check_image(settings: ModelPlan, model: Any) -> None:
    embed = model.patch_embed
    if not getattr(model, "dynamic_img_size", False) or hasattr(embed, "backbone"):
        return
    side = max(embed.patch_size)
    if settings.image_size % side and not getattr(model, "dynamic_img_pad", False):
        raise ModelPlanError("image_size", f"a multiple of {side}", settings.image_size)
