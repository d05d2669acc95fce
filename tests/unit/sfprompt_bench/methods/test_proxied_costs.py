"""The cost of methods on a proxy, against counts by hand and timm's own model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from protocol.plan import ModelPlan, RunPlan
from sfprompt_bench.cost.method_cost import Question
from sfprompt_bench.estimate.calculator import estimate
from sfprompt_bench.methods.registry import ESTIMATED
from split_model.backbone.libraries import timm
from tuning_methods.proxies.settings import DistillationSettings

IMAGES, EPOCHS = 50, 2

WIDTH, CLASSIFIER = 768, 100 * 769

BLOCK = 12 * WIDTH**2 + 13 * WIDTH

FRAME = 3 * 256 * WIDTH + WIDTH + WIDTH + 197 * WIDTH + 2 * WIDTH  # all around the blocks

PRUNED = (3072 - 768) * (2 * WIDTH + 1)  # what one pruned block lacks

LORA = 2 * 2 * 8 * WIDTH  # in one block

VIT = ModelPlan(
    backbone="vit_base_patch16_224", weights="random:0", image_size=224, num_classes=100
)


def question(**model: object) -> Question:
    settings = VIT.model_copy(update=model)
    return Question(RunPlan(model=settings), IMAGES, local_epochs=EPOCHS)


def narrow(width: int) -> tuple[int, ...]:
    """Widths of the MLPs of a proxy whose two ends are unchanged."""
    return (0, *[width] * 10, 0)


def test_parameters_and_bytes_are_those_counted_by_hand() -> None:
    cost = ESTIMATED["fedpft"].cost(question())
    assert cost.trainable_parameters == 12 * LORA + CLASSIFIER
    start = FRAME + 12 * BLOCK - 10 * PRUNED + cost.trainable_parameters
    assert cost.bytes_start == 4 * start
    assert cost.bytes_up_per_round == cost.bytes_down_per_round == 4 * (12 * LORA + CLASSIFIER)
    cost = ESTIMATED["offsite-tuning"].cost(question())
    assert cost.trainable_parameters == 2 * LORA + CLASSIFIER
    assert cost.bytes_start == 4 * (FRAME + 6 * BLOCK + cost.trainable_parameters)


def test_operations_are_those_of_timm_s_model_with_the_same_way_back() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
        for block in model.blocks[1:-1]:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(768, 768), nn.Linear(768, 768)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    # LoRA wants the gradient of the first block's projection, but not of its input; hooks
    # that add LoRA to the projection make that so here, too.
    for block in model.blocks:
        downs = [nn.Parameter(torch.empty(8, WIDTH, device="meta")) for _ in "qv"]
        ups = [nn.Parameter(torch.empty(WIDTH, 8, device="meta")) for _ in "qv"]

        def hook(_, given, joint, downs=downs, ups=ups):  # type: ignore[no-untyped-def]
            query, value = ((given[0] @ d.T) @ u.T for d, u in zip(downs, ups, strict=True))
            return joint + torch.cat([query, torch.zeros_like(query), value], dim=-1)

        block.attn.qkv.register_forward_hook(hook)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta")).sum().backward()
    cost = ESTIMATED["fedpft"].cost(question()).device_flops_per_round
    assert cost == pytest.approx(IMAGES * EPOCHS * counter.get_total_flops(), rel=1e-3)
    assert cost < 0.7 * ESTIMATED["fedpeft-bias"].cost(question()).device_flops_per_round


def test_the_proxy_of_a_run_is_used_unchanged() -> None:
    own = {"prompt_count": 0, "tune": "lora", "lora_rank": 2, "mlp_widths": narrow(1536)}
    cost = ESTIMATED["fedpft"].cost(question(cut=12, **own))
    assert cost.trainable_parameters == 12 * LORA // 4 + CLASSIFIER
    lacks = 10 * 1536 * (2 * WIDTH + 1)
    assert cost.bytes_start == 4 * (FRAME + 12 * BLOCK - lacks + cost.trainable_parameters)


def test_memory_falls_with_what_the_proxy_lacks() -> None:
    small, large = (
        ESTIMATED["fedpft"].cost(
            question(cut=12, prompt_count=0, tune="lora", mlp_widths=narrow(width))
        )
        for width in (768, 3072)
    )
    # Each lacks weights once, and per image and token the outputs of the first layer.
    weights = 4 * 10 * PRUNED
    kept = 4 * 32 * 10 * 197 * (3072 - 768)
    assert large.device_peak_bytes - small.device_peak_bytes == weights + kept


def test_a_backbone_without_proxies_has_all_the_other_methods() -> None:
    beit = question(backbone="beit_base_patch16_224")
    assert ESTIMATED.keys() - estimate(beit).keys() == {"fedpft", "offsite-tuning"}


def test_a_small_body_costs_its_download_and_its_passes() -> None:
    bare = question(prompt_count=5)
    plan = bare.plan.model_copy(update={"method": {"local_body": 2}})
    more = dataclasses.replace(bare, plan=plan)
    one, two = (ESTIMATED["sfprompt-paper"].cost(case) for case in (bare, more))
    assert two.bytes_start - one.bytes_start == 4 * 2 * BLOCK
    tokens = 197 + 5
    block = 2 * tokens * 12 * WIDTH**2 + 4 * tokens**2 * WIDTH
    # Forward and back, for each sample of the one local epoch.
    assert two.device_flops_per_round - one.device_flops_per_round == 2 * 2 * block * IMAGES
    assert two.bytes_per_round == one.bytes_per_round


def test_a_proxy_that_is_distilled_again_is_downloaded_again() -> None:
    cost = ESTIMATED["fedpft"].cost(question())
    proxy = FRAME + 12 * BLOCK - 10 * PRUNED
    reported = 10 * 768
    assert cost.bytes_total(10) == cost.bytes_start + 10 * cost.bytes_per_round
    for rounds, times in ((11, 1), (20, 1), (21, 2), (50, 4)):
        rest = cost.bytes_start + rounds * cost.bytes_per_round
        assert cost.bytes_total(rounds) - rest == times * 4 * (proxy + reported)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
        for block in model.blocks[1:-1]:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(768, 768), nn.Linear(768, 768)
        model(torch.empty(1, 3, 224, 224))
    again = cost.flops_total(11) - 11 * cost.device_flops_per_round
    assert again == pytest.approx(IMAGES * counter.get_total_flops(), rel=0.02)  # plus LoRA


def test_a_run_with_a_proxy_sets_how_often_it_is_distilled() -> None:
    own = {"mlp_widths": narrow(768), "cut": 12, "prompt_count": 0, "tune": "lora"}
    with_proxy = question(**own)
    assert ESTIMATED["fedpft"].cost(with_proxy).renewals(1000) == 0
    often = DistillationSettings(epochs=1, every=3)
    plan = with_proxy.plan.model_copy(update={"method": {"distillation": often.model_dump()}})
    cost = ESTIMATED["fedpft"].cost(Question(plan, IMAGES, local_epochs=EPOCHS))
    assert [cost.renewals(rounds) for rounds in (0, 3, 4, 6, 7)] == [0, 0, 1, 1, 2]
    assert ESTIMATED["offsite-tuning"].cost(question()).renewals(1000) == 0
