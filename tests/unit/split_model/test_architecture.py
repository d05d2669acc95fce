"""The backbones that can be cut, and the refusal of the others by name."""

from typing import Any

import pytest
import torch
from torch import nn

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, body_blocks, skeleton, supported_backbones
from split_model.backbone.libraries import timm, torchvision
from split_model.errors import ModelPlanError, UnsupportedBackboneError
from tests.support.uncut_model import reduced

TINY: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 32,
    "model_overrides": (("depth", 2),),
}


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "samvit_base_patch16",
        "vit_relpos_base_patch16_224",
        "naflexvit_base_patch16_gap",
        "swin_tiny_patch4_window7_224",
        "no_such_model",
        "hf-hub:somebody/something",
        "local-dir:/tmp",
    ],
)
def test_other_architectures_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedBackboneError) as caught:
        skeleton(ModelPlan(backbone=name))
    assert (caught.value.field, caught.value.value) == ("model.backbone", name)
    assert name in str(caught.value)
    assert "VisionTransformer" in str(caught.value.limit)


def test_every_plain_transformer_of_timm_is_supported() -> None:
    supported = set(supported_backbones())
    assert len(supported) >= 270
    # No other module of timm builds one of the supported classes.
    modules = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    classes = ("VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit")
    with_class = {
        m for m in modules if any(hasattr(__import__(m, fromlist=["_"]), c) for c in classes)
    }
    ours = {timm.model_entrypoint(name).__module__ for name in supported}
    assert ours <= with_class
    for module in with_class - ours:
        name = timm.list_models(module=module.rsplit(".", 1)[-1])[0]
        with torch.device("meta"):
            assert type(timm.create_model(name)).__name__ not in classes, name


def test_a_pretrained_tag_may_follow_the_name() -> None:
    assert anatomy(ModelPlan(**{**TINY, "backbone": "vit_tiny_patch16_224.augreg_in21k"}))


def test_a_skeleton_has_no_memory() -> None:
    model = skeleton(ModelPlan(backbone="vit_large_patch16_224", image_size=224))
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_caller_may_change_its_skeleton() -> None:
    settings = ModelPlan(**TINY)
    skeleton(settings).blocks = nn.Sequential()
    assert len(skeleton(settings).blocks) == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cut": 3}, "cut"),
        ({"cut": 2, "tail_blocks": 1}, "cut"),
        ({"tail_blocks": 3, "cut": 0}, "tail_blocks"),
        ({"cut": 2, "prompt_at": "cut"}, "prompt_at"),
        ({"cut": 1, "tail_blocks": 1, "prompt_at": "cut", "prompt_depth": "deep"}, "prompt_depth"),
        ({"image_size": 8}, "image_size"),
        ({"model_overrides": (("no_such_argument", 1),)}, "model_overrides"),
        ({"model_overrides": (("embed_dim", 7),)}, "model_overrides"),
        ({"blocks": (0, 2)}, "blocks"),
        ({"blocks": (1,), "cut": 2}, "cut"),
        ({"mlp_widths": (8,)}, "mlp_widths"),
        ({"mlp_widths": (8, 769)}, "mlp_widths"),
    ],
)
def test_limits_that_need_the_architecture(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelPlanError) as caught:
        skeleton(ModelPlan(**{**TINY, **changes}))
    assert caught.value.field == f"model.{field}"


def test_a_fixed_image_size_must_fit_the_patches() -> None:
    with pytest.raises(ModelPlanError) as caught:
        skeleton(ModelPlan(backbone="vit_small_patch14_dinov2", image_size=30))
    assert (caught.value.field, caught.value.limit) == ("model.image_size", "a multiple of 14")


def test_a_dynamic_image_size_must_fit_the_patches() -> None:
    with pytest.raises(ModelPlanError, match="a multiple of 14"):
        skeleton(ModelPlan(backbone="vit_intern300m_patch14_448", image_size=30))


def test_anatomy() -> None:
    sizes = anatomy(reduced("vit_base_patch14_reg4_dinov2"))
    assert (sizes.depth, sizes.width, sizes.prefix, sizes.patches) == (2, 32, 5, 9)
    assert sizes.tokens == 14
    assert sizes.num_tokens == 1
    assert anatomy(reduced("deit_tiny_distilled_patch16_224")).num_tokens == 2
    assert anatomy(reduced("vit_base_patch16_siglip_224")).num_tokens is None
    assert body_blocks(ModelPlan(cut=2, tail_blocks=3)) == range(2, 9)
    shaped = ModelPlan(**{**TINY, "blocks": (1,), "mlp_widths": (8,)})
    assert (anatomy(ModelPlan(**TINY)).mlp_widths, anatomy(shaped).mlp_widths) == ((768, 768), (8,))


@pytest.mark.parametrize("field", ["blocks", "mlp_widths"])
def test_blocks_that_depend_on_their_place_are_neither_left_out_nor_narrowed(field: str) -> None:
    plan = reduced("beit_base_patch16_224")
    assert anatomy(plan).mlp_widths == ()
    with pytest.raises(ModelPlanError, match="plain vision transformer") as caught:
        anatomy(plan.replace(**{field: (0, 1)}))
    assert (caught.value.field, caught.value.value) == (f"model.{field}", [0, 1])


def test_torchvision_works_over_this_torch() -> None:
    resize = torchvision.transforms.Resize(4)
    assert resize(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
