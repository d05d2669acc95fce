"""The body read at several depths equals hooks on timm's own blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, skeleton
from split_model.parts.build import Layered, build_body, build_tail
from split_model.parts.depths import feature_shape, pool_depth, read_blocks, read_tokens

PLAN = ModelPlan(
    backbone="vit_tiny_patch16_224",
    weights="random:0",
    image_size=32,
    num_classes=5,
    cut=1,
    prompt_at="cut",
    prompt_depth="deep",
    prompt_count=3,
    depths=4,
    rank=64,
)


def random_weights(plan: ModelPlan) -> dict[str, Tensor]:
    """timm's own names and shapes, seeded."""
    generator = torch.Generator().manual_seed(0)
    model = skeleton(plan.replace(depths=0, rank=0), range(anatomy(plan).depth))
    return {
        name: 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def smashed(plan: ModelPlan, batch: int = 2) -> Tensor:
    sizes = anatomy(plan)
    return torch.randn(batch, sizes.tokens, sizes.width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("cut", "depths", "blocks"),
    [(1, 4, (3, 6, 9, 11)), (0, 3, (3, 7, 11)), (10, 4, (10, 11)), (1, 1, (11,))],
)
def test_depths_are_evenly_spaced_and_include_the_last_block(
    cut: int, depths: int, blocks: tuple[int, ...]
) -> None:
    assert read_blocks(PLAN.replace(cut=cut, depths=depths)) == blocks


@pytest.mark.parametrize("prompt_depth", ["deep", "shallow"])
def test_what_is_read_is_pooled_from_the_outputs_of_the_blocks(prompt_depth: str) -> None:
    plan = PLAN.replace(prompt_depth=prompt_depth)
    body, data = build_body(plan, random_weights(plan)), smashed(plan)
    prompts = torch.randn(
        11 if prompt_depth == "deep" else 1, 3, 192, generator=torch.Generator().manual_seed(2)
    )
    outputs: dict[int, Tensor] = {}
    for name, block in body.blocks.items():
        block.register_forward_hook(lambda _m, _i, out, n=int(name): outputs.update({n: out}))
    body.whole_blocks = True
    read = body(data, prompts)
    expected = []
    for number in (3, 6, 9, 11):
        tokens = F.layer_norm(outputs[number], (192,), eps=1e-6)
        patches = tokens[:, -anatomy(plan).patches :]
        expected += [tokens[:, 0], patches.mean(1), patches.var(1, unbiased=False).add(1e-6).sqrt()]
    torch.testing.assert_close(read, torch.stack(expected, dim=1), atol=1e-5, rtol=1e-5)
    assert read.shape[1] == read_tokens(plan) == 12


def test_a_batch_with_different_prompts_equals_its_samples_alone() -> None:
    body, data = build_body(PLAN, random_weights(PLAN)), smashed(PLAN)
    prompts = torch.randn(2, 11, 3, 192, generator=torch.Generator().manual_seed(3))
    together = body(data, prompts)
    for sample in range(2):
        alone = body(data[sample : sample + 1], prompts[sample])
        torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-5, rtol=1e-5)


def test_prompts_have_a_gradient_through_every_depth() -> None:
    body, data = build_body(PLAN, random_weights(PLAN)), smashed(PLAN)
    prompts = torch.randn(11, 3, 192, generator=torch.Generator().manual_seed(4)).requires_grad_()
    body(data, prompts)[:, -3:].sum().backward()
    assert prompts.grad is not None
    assert bool((prompts.grad.abs().amax(dim=(1, 2)) > 0).all())


def test_a_backbone_without_class_token_gives_mean_and_spread() -> None:
    plan = PLAN.replace(backbone="vit_tiny_patch16_224", depths=1)
    sizes = anatomy(plan)
    tokens = smashed(plan)
    assert pool_depth(tokens, sizes).shape == (2, 3, 192)
    without = ModelPlan.model_validate(
        {**dict(plan), "model_overrides": (("class_token", False), ("global_pool", "avg"))}
    )
    assert read_tokens(without) == 2


def test_the_tail_is_linear_in_the_features_of_its_shape() -> None:
    state = {"head.weight": torch.randn(5, 64), "head.bias": torch.randn(5)}
    tail = build_tail(PLAN, Layered(state, random_weights(PLAN)))
    features = torch.randn(2, *feature_shape(PLAN))
    expected = features[:, 0] @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(tail(features), expected)
    assert feature_shape(PLAN) == (1, 64)
    assert feature_shape(PLAN.replace(rank=0)) == (1, 12 * 192)
