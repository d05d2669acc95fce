"""Merged tokens against means computed by hand, and a body with merged tokens."""

import pytest
import torch

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_model.layers.token_merging import merge_tokens
from split_model.parts.body import Body
from split_model.parts.head import Head
from split_model.parts.tail import Tail
from tests.support.uncut_model import refused_field

TINY = {"backbone": "vit_tiny_patch16_224", "image_size": 64, "prompt_at": "cut"}


def test_the_most_similar_pair_becomes_its_mean() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [1.0, 0.0]]])
    merged = merge_tokens(tokens, 3)
    # Givers are 0 and 2, takers 1 and 3; token 0 points exactly where token 3 does.
    expected = torch.tensor([[[3.0, 0.1], [0.0, 2.0], [1.0, 0.0]]])
    torch.testing.assert_close(merged, expected)


def test_a_merged_token_has_the_weight_of_its_original_tokens() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [4.0, 0.0], [1.0, 1.0]]])
    torch.testing.assert_close(merge_tokens(tokens, 1), tokens.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("keep", [1, 2, 5, 8, 15, 16])
def test_the_weighted_sum_of_all_tokens_is_kept_up_to_the_merging(keep: int) -> None:
    tokens = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    merged = merge_tokens(tokens, keep)
    assert merged.shape == (3, keep, 8)
    if keep == 16:
        assert torch.equal(merged, tokens)


def test_merging_does_not_depend_on_the_batch() -> None:
    tokens = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([merge_tokens(image, 5) for image in tokens.split(1)])
    torch.testing.assert_close(merge_tokens(tokens, 5), alone)


def test_fewer_tokens_cross_the_cut() -> None:
    settings = ModelPlan(**TINY, prompt_count=2, prompt_depth="deep", keep_tokens=6)
    assert anatomy(settings).tokens == 1 + 6
    with torch.device("meta"):
        smashed = Head(settings)(torch.empty(2, 3, 64, 64))
        features = Body(settings)(smashed, torch.empty(11, 2, 192))
        logits = Tail(settings)(features)
    assert smashed.shape == (2, 7, 192)
    assert features.shape == (2, 9, 192)
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"keep_tokens": 17},
        {"keep_tokens": 4, "prompt_at": "input"},
        {"keep_tokens": 4, "backbone": "eva02_tiny_patch14_224", "image_size": 56},
        {"keep_tokens": -1},
    ],
)
def test_impossible_merging_is_refused(change: dict[str, object]) -> None:
    assert refused_field(lambda: anatomy(ModelPlan(**{**TINY, **change}))) == "keep_tokens"
