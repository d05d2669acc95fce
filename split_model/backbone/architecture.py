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
    mlp_widths: tuple[int, ...] = ()  # neurons in each block's MLP; empty: blocks are not plain

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
    if settings.is_reshaped:
        model = copy.deepcopy(_pristine(settings.replace(blocks=(), mlp_widths=())))
        with torch.device("meta"):
            _shape_blocks(settings, model)
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
        blocks=settings.blocks,
        mlp_widths=settings.mlp_widths,
    )
    pristine = _pristine(uncut)
    _check(settings, _measure(pristine))
    _check_image(settings, pristine)
    return pristine


def kept_blocks(settings: ModelPlan) -> tuple[int, ...]:
    """The numbers of the backbone's blocks that the model has, in order; raises as `skeleton`."""
    depth = anatomy(settings).depth
    return settings.blocks or tuple(range(depth))


def _shape_blocks(settings: ModelPlan, model: Any) -> None:
    """Leave out blocks of timm's whole model on the meta device and narrow MLPs, in place.

    The remaining blocks are numbered from 0, so that the result is a model like any other.

    Raises:
        ModelPlanError: the backbone does not allow this shape.
    """
    field, depth = "blocks" if settings.blocks else "mlp_widths", len(model.blocks)
    if not _has_plain_blocks(model):
        limit = f"empty for {settings.backbone}: its blocks are not a plain vision transformer's"
        raise ModelPlanError(field, limit, getattr(settings, field))
    numbers = settings.blocks or tuple(range(depth))
    if numbers[-1] >= depth:
        limit = f"numbers below {depth}, the blocks of {settings.backbone}"
        raise ModelPlanError("blocks", limit, settings.blocks)
    widths = settings.mlp_widths or (0,) * len(numbers)
    if len(widths) != len(numbers):
        limit = f"empty or one width for each of {len(numbers)} blocks"
        raise ModelPlanError("mlp_widths", limit, widths)
    model.blocks = nn.Sequential(*(model.blocks[number] for number in numbers))
    for block, width in zip(model.blocks, widths, strict=True):
        if width:
            _narrow(settings, block.mlp, width)


def _has_plain_blocks(model: Any) -> bool:
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


def _narrow(settings: ModelPlan, mlp: Any, width: int) -> None:
    first, second = mlp.fc1, mlp.fc2
    if width > first.out_features:
        limit = f"at most the {first.out_features} neurons of an MLP of {settings.backbone}"
        raise ModelPlanError("mlp_widths", limit, width)
    mlp.fc1 = nn.Linear(first.in_features, width, bias=first.bias is not None, device="meta")
    mlp.fc2 = nn.Linear(width, second.out_features, bias=second.bias is not None, device="meta")


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
        mlp_widths=tuple(block.mlp.fc1.out_features for block in model.blocks)
        if _has_plain_blocks(model)
        else (),
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
    if hasattr(embed, "backbone"):
        return
    side, pads = max(embed.patch_size), getattr(model, "dynamic_img_pad", False)
    if settings.image_size % side and not pads:  # timm would drop the last rows and columns
        raise ModelPlanError("image_size", f"a multiple of {side}", settings.image_size)
