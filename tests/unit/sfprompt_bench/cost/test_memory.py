"""The formulas of activations against the tensors that autograd keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from sfprompt_bench.cost.sizes import passed_blocks, peak_bytes, run_blocks, trained_blocks
from split_model.backbone.libraries import timm

SETTINGS = ModelPlan(backbone="vit_tiny_patch16_224", image_size=224, cut=1, prompt_count=0)

TOKENS, WIDTH, BLOCKS = 197, 192, 3


@pytest.fixture(scope="module")
def blocks() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", depth=BLOCKS, num_classes=2)
    found: nn.Module = model.blocks
    return found


def saved_numbers(run: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Numbers that autograd keeps for the backward pass, each storage once, weights aside."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: list[Tensor] = []  # held, so that no storage is used again while we count

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in seen and tensor.is_floating_point():
            seen.add(pointer)
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept)


@pytest.mark.parametrize("trained", [False, True])
def test_blocks_keep_what_the_formula_says(blocks: nn.Module, trained: bool) -> None:
    blocks.requires_grad_(trained)
    tokens = torch.randn(
        1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    saved = saved_numbers(lambda: blocks(tokens), list(blocks.parameters()))
    formula = (trained_blocks if trained else passed_blocks)(SETTINGS, BLOCKS, TOKENS)
    assert formula == pytest.approx(saved, rel=0.08)


def test_widths_are_those_of_a_vision_transformer() -> None:
    assert trained_blocks(SETTINGS, 2, 10) == 2 * 10 * 16 * WIDTH
    assert passed_blocks(SETTINGS, 2, 10) == 2 * 10 * 10 * WIDTH
    assert run_blocks(SETTINGS, 2, 10) == 10 * 9 * WIDTH
    assert run_blocks(SETTINGS, 0, 10) == 0


def test_trained_numbers_have_a_gradient_and_two_moments() -> None:
    assert peak_bytes(weights=100, trained=10, batch_size=8, activations=5) == 4 * (100 + 30 + 40)
