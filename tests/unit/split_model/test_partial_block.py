"""A partial run of a block equals timm's full run, and other blocks are not run partially."""

import pytest
import torch
from torch import nn

from split_model.layers.partial_block import run_for_tokens, supports_partial_run
from tests.support.uncut_model import difference, random_model, reduced

NAMES = [
    "vit_base_patch16_224",
    "vit_base_patch14_reg4_dinov2",  # layer scale
    "vit_base_patch16_siglip_224",
]


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_partial_run_equals_that_part_of_the_full_run(name: str, count: int, others: int) -> None:
    block = random_model(reduced(name)).blocks[0]
    assert supports_partial_run(block)
    width = block.norm1.normalized_shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5 + others, width, generator=generator).requires_grad_()
    weighting = torch.randn(2, count, width, generator=generator)
    whole = block(tokens)[:, :count]
    partial = run_for_tokens(block, tokens[:, :5], tokens[:, 5:] if others else None, count)
    assert difference(partial, whole) <= 1e-5
    (theirs,) = torch.autograd.grad((whole * weighting).sum(), tokens)
    (mine,) = torch.autograd.grad((partial * weighting).sum(), tokens)
    assert difference(mine, theirs) <= 1e-4


def test_a_block_with_another_layer_is_not_run_partially() -> None:
    class Scaled(nn.Linear):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(tokens)

    block = random_model(reduced("vit_base_patch16_224")).blocks[0]
    block.attn.qkv = Scaled(block.attn.qkv.in_features, block.attn.qkv.out_features)
    assert not supports_partial_run(block)


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "beit_base_patch16_224"])
def test_blocks_that_depend_on_positions_are_run_in_full(name: str) -> None:
    assert not supports_partial_run(random_model(reduced(name)).blocks[0])
