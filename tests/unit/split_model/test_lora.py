"""LoRA: values and gradients against hooks on the uncut model, and merging into the weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.checkpoints.export import TunedModel
from split_model.checkpoints.state import (
    TunedState,
    head_tensors,
    initial_state,
    read_state,
    state_shapes,
    tail_tensors,
)
from split_model.layers.adapters import lora_blocks, merged
from split_model.parts.build import Layered, build_head, build_tail, frozen_names
from tests.support.uncut_model import difference, random_model, reduced, refused_field

PLAIN = reduced("vit_base_patch16_224").replace(prompt_count=0)

LORA = PLAIN.replace(tune="lora", lora_rank=3)

CUTS = [(2, 0), (1, 1)]


def stirred(settings: ModelPlan, weights: dict[str, Tensor]) -> TunedState:
    """A state with no tensor at its initial value."""
    generator = torch.Generator().manual_seed(7)
    state = initial_state(settings, weights, seed=0)
    return {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def images() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def hooked(model: nn.Module, state: TunedState) -> dict[str, Tensor]:
    """Add the same changes to timm's uncut model by hooks; returns their tensors, as leaves."""
    leaves = {n: t.clone().requires_grad_(True) for n, t in state.items() if ".lora_" in n}
    width = 32

    def hook_of(block: int) -> object:
        def hook(_: nn.Module, given: tuple[Tensor], joint: Tensor) -> Tensor:
            part = "head." if f"head.blocks.{block}.attn.qkv.lora_q_up" in leaves else "tail."
            name = f"{part}blocks.{block}.attn.qkv.lora_"
            for role, start in (("q", 0), ("v", 2 * width)):
                matrix = leaves[f"{name}{role}_up"] @ leaves[f"{name}{role}_down"]
                change = torch.einsum("oi,bti->bto", matrix, given[0])
                joint = joint + nn.functional.pad(change, (start, 2 * width - start))
            return joint

        return hook

    for number, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(hook_of(number))
    for name in ("weight", "bias"):
        model.head.get_parameter(name).data.copy_(state[f"tail.head.{name}"])
    return leaves


@pytest.mark.parametrize(("cut", "tail_blocks"), CUTS)
def test_values_and_gradients_are_those_of_hooks_on_the_uncut_model(
    cut: int, tail_blocks: int
) -> None:
    settings = LORA.replace(cut=cut, tail_blocks=tail_blocks)
    model = random_model(settings)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    state = stirred(settings, weights)
    head = build_head(settings, Layered(head_tensors(state), weights))
    tail = build_tail(settings, Layered(tail_tensors(state), weights))
    logits = tail(head(images()))
    logits.square().sum().backward()
    leaves = hooked(model, state)
    expected = model(images())
    expected.square().sum().backward()
    assert difference(logits, expected) <= 1e-5
    assert len(leaves) == 2 * 4
    for name, leaf in leaves.items():
        part = head if name.startswith("head.") else tail
        parameter = dict(part.named_parameters())[name.split(".", 1)[1]]
        assert difference(parameter.grad, leaf.grad) <= 1e-4
    assert difference(tail.trunk.head.weight.grad, model.head.weight.grad) <= 1e-4
    assert all(p.requires_grad or p.grad is None for p in head.parameters())


@pytest.mark.parametrize(("cut", "tail_blocks"), CUTS)
def test_merging_does_not_change_the_function(cut: int, tail_blocks: int) -> None:
    settings = LORA.replace(cut=cut, tail_blocks=tail_blocks)
    weights = random_model(settings).state_dict()
    before = {n: t.clone() for n, t in weights.items()}
    state = stirred(settings, weights)
    plain, changed, rest = merged(settings, weights, state)
    assert plain.tune == "classifier"
    assert set(rest) == {"tail.head.weight", "tail.head.bias"}
    unmerged = TunedModel(settings, weights, state)(images())
    assert difference(TunedModel(plain, changed, rest)(images()), unmerged) <= 1e-5
    untouched = TunedModel(plain, weights, rest)(images())
    assert difference(untouched, unmerged) > 1e-2
    assert all(torch.equal(weights[n], t) for n, t in before.items())


def test_tuning_begins_with_the_backbones_function() -> None:
    settings = LORA.replace(cut=2)
    weights = random_model(settings).state_dict()
    state = initial_state(settings, weights, seed=4)
    assert read_state(
        build_tail(settings, Layered(tail_tensors(state), weights)),
        None,
        build_head(settings, Layered(head_tensors(state), weights)),
    ).keys() == set(state)
    _, _, rest = merged(settings, weights, state)
    plain = settings.replace(tune="classifier")
    assert (
        difference(
            TunedModel(settings, weights, state)(images()),
            TunedModel(plain, weights, rest)(images()),
        )
        == 0
    )
    downs = [t for n, t in state.items() if n.endswith("_down")]
    assert len(downs) == 4
    assert all(0.1 < float(t.std()) * math.sqrt(32) < 2 for t in downs)
    assert not torch.equal(downs[0], downs[1])


def test_with_ends_the_blocks_between_are_unchanged() -> None:
    overrides = (("depth", 5), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8))
    settings = LORA.replace(cut=5, lora_ends=1, model_overrides=overrides)
    assert lora_blocks(settings) == {0, 4}
    blocks = {name.split(".")[2] for name in state_shapes(settings) if ".lora_" in name}
    assert blocks == {"0", "4"}


def test_vit_b_has_the_parameters_counted_by_hand() -> None:
    settings = ModelPlan(
        backbone="vit_base_patch16_224", image_size=224, cut=12, num_classes=100, prompt_count=0
    )
    shapes = state_shapes(settings.replace(tune="lora"))
    # Two matrices of each of 12 blocks, 8 x 768 down and up, and the classifier.
    assert sum(map(math.prod, shapes.values())) == 12 * 2 * 2 * 8 * 768 + 100 * 769


def test_lora_is_not_frozen() -> None:
    settings = LORA.replace(cut=1, tail_blocks=1)
    assert not any("lora_" in name for name in frozen_names(settings))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_base_patch16_dinov3"])
def test_attention_without_a_joint_projection_is_refused(name: str) -> None:
    settings = reduced(name).replace(tune="lora", cut=2)
    assert refused_field(lambda: state_shapes(settings)) == "tune"


def test_prompts_at_the_cut_need_a_frozen_head() -> None:
    assert refused_field(lambda: LORA.replace(prompt_at="cut", prompt_count=2)) == "tune"
