"""A body that the server tunes: what it tunes, and that its folded weights are the same body."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional as F

from protocol.plan import BodyTuning, ModelPlan
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.parts.build import build_body
from split_model.parts.own_body import OwnBody

PLAN = ModelPlan(
    backbone="vit_tiny_patch16_224",
    weights="random:0",
    image_size=32,
    cut=10,
    prompt_at="cut",
    prompt_count=0,
    depths=2,
    rank=8,
    lora_rank=4,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, torch.Tensor]:
    backbone = prepare_backbone(PLAN, PLAN.weights, tmp_path_factory.mktemp("backbones"))
    return open_backbone(backbone.path)


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        # 2 blocks, 2 norms of 2 x 192; 4 biases a block, 3 x 192 + 192 + 768 + 192 and the norms';
        # 2 changes a block of 4 x 192 down and up.
        ("layernorm", 2 * 2 * 2 * 192),
        ("bias", 2 * (576 + 192 + 768 + 192 + 2 * 192)),
        ("lora", 2 * 2 * 2 * 4 * 192),
    ],
)
def test_a_folded_body_computes_what_the_tuned_one_does(
    weights: Mapping[str, torch.Tensor], tuning: BodyTuning, expected: int
) -> None:
    own = OwnBody(PLAN, weights, tuning, seed=0)
    assert sum(parameter.numel() for parameter in own.parameters) == expected
    smashed = torch.randn(5, 5, 192, generator=torch.Generator().manual_seed(1))
    frozen = build_body(PLAN, weights)(smashed)
    torch.testing.assert_close(own.body(smashed), frozen)  # it begins as the backbone

    target = torch.randn(frozen.shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(own.parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(own.body(smashed), target).backward()
        optimizer.step()
    tuned = own.body(smashed).detach()
    assert float((tuned - frozen).norm() / frozen.norm()) > 1e-3

    folded = own.folded()
    torch.testing.assert_close(build_body(PLAN, folded)(smashed), tuned, atol=1e-4, rtol=1e-4)
    changed = {name for name in folded if not torch.equal(folded[name], weights[name])}
    assert changed
    assert all(name.startswith(("blocks.10.", "blocks.11.")) for name in changed)
    torch.testing.assert_close(build_body(PLAN, weights)(smashed), frozen, atol=0, rtol=0)
