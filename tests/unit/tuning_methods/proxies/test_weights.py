"""Proxies: which neurons and blocks they keep, and how their tuned state fits the backbone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from protocol.plan import ModelPlan, RunPlan
from split_model.backbone.architecture import anatomy
from split_model.checkpoints.export import TunedModel
from split_model.checkpoints.state import initial_state
from split_model.parts.head import Head
from tests.support.uncut_model import difference, random_model, reduced, refused_field
from tuning_methods.fedpft.settings import FedPFT
from tuning_methods.offsite_tuning.settings import OffsiteTuning
from tuning_methods.proxies.server import ProxyServer
from tuning_methods.proxies.weights import (
    backbone_plan,
    insert_into_backbone,
    proxy_weights,
    rank_neurons,
)

DEPTH, HIDDEN = 6, 128

FULL = reduced("vit_base_patch16_224").replace(
    cut=DEPTH,
    prompt_count=0,
    tune="lora",
    lora_rank=2,
    model_overrides=(("depth", DEPTH), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8)),
)

PRUNED = FULL.replace(mlp_widths=(0, 40, 40, 40, 40, 0))

DROPPED = FULL.replace(blocks=(0, 2, 4, 5), cut=4)


def images() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def random_state(settings: ModelPlan, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    state = initial_state(settings, weights, seed=0)
    return {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def test_neurons_are_ranked_by_the_norm_of_their_weights() -> None:
    # By hand: 3² + 4² = 25, 0 + 6² = 36, 1 + 1 = 2, 5² + 0 = 25 (after its equal).
    weights_in = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0], [4.0, 3.0]])
    weights_out = torch.tensor([[0.0, 6.0, -1.0, 0.0], [-4.0, 0.0, 0.0, 0.0]])
    assert rank_neurons(weights_in, weights_out).tolist() == [1, 0, 3, 2]


def test_a_pruned_mlp_equals_one_whose_other_neurons_are_zeroed() -> None:
    model = random_model(FULL)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    state = random_state(PRUNED, proxy_weights(PRUNED, weights))
    logits = TunedModel(PRUNED, proxy_weights(PRUNED, weights), state)(images())
    zeroed = {n: t.clone() for n, t in weights.items()}
    for number in range(1, DEPTH - 1):
        name = f"blocks.{number}.mlp.fc"
        norms = torch.cat([weights[name + "1.weight"], weights[name + "2.weight"].T], 1).norm(dim=1)
        pruned = sorted(range(HIDDEN), key=lambda neuron: float(norms[neuron]))[: HIDDEN - 40]
        zeroed[name + "2.weight"][:, pruned] = 0
    full = PRUNED.replace(mlp_widths=())
    assert difference(logits, TunedModel(full, zeroed, state)(images())) <= 1e-5
    assert difference(logits, TunedModel(full, weights, state)(images())) > 1e-2


def test_a_dropped_proxy_equals_the_model_without_these_blocks() -> None:
    model = random_model(FULL)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    proxy = proxy_weights(DROPPED, weights)
    assert anatomy(DROPPED).depth == 4
    state = initial_state(DROPPED, proxy, seed=0)
    classifier = {
        n.removeprefix("tail.head."): t for n, t in state.items() if n.startswith("tail.head.")
    }
    model.head.load_state_dict(classifier)
    model.blocks = torch.nn.Sequential(*(model.blocks[number] for number in (0, 2, 4, 5)))
    assert difference(TunedModel(DROPPED, proxy, state)(images()), model(images())) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_widths": (0, *[HIDDEN] * 4, 0)},
        {"mlp_widths": (0,) * DEPTH},
        {"blocks": tuple(range(DEPTH))},
    ],
)
def test_a_proxy_without_omissions_equals_the_model(changes: dict[str, object]) -> None:
    settings = FULL.replace(**changes)
    weights = random_model(FULL).state_dict()
    proxy = proxy_weights(settings, weights)
    assert proxy.keys() == weights.keys()
    assert all(torch.equal(proxy[name], weights[name]) for name in weights)
    state = random_state(settings, proxy)
    assert torch.equal(
        TunedModel(settings, proxy, state)(images()), TunedModel(FULL, weights, state)(images())
    )


def test_a_state_tuned_on_a_pruned_proxy_fits_the_backbone() -> None:
    weights = random_model(FULL).state_dict()
    state = random_state(PRUNED, proxy_weights(PRUNED, weights))
    settings, full_state = insert_into_backbone(PRUNED, state)
    assert settings == backbone_plan(PRUNED) == PRUNED.replace(mlp_widths=())
    assert full_state.keys() == state.keys()


def test_a_state_tuned_at_a_dropped_proxys_ends_moves_to_the_backbones_ends() -> None:
    ends = DROPPED.replace(lora_ends=1)
    weights = random_model(FULL).state_dict()
    state = random_state(ends, proxy_weights(ends, weights))
    settings, full_state = insert_into_backbone(ends, state)
    assert (settings.cut, settings.blocks) == (DEPTH, ())
    changed = {n.split(".")[2] for n, t in full_state.items() if "lora_" in n and t.any()}
    assert changed == {"0", "5"}
    last = "head.blocks.{}.attn.qkv.lora_v_up"
    assert torch.equal(full_state[last.format(5)], state[last.format(3)])
    # By hand: LoRA in the last block, the blocks between unchanged.
    expected = TunedModel(
        FULL.replace(lora_ends=1),
        weights,
        {n.replace("blocks.3.", "blocks.5."): t for n, t in state.items()},
    )
    assert (
        difference(TunedModel(settings, weights, full_state)(images()), expected(images())) <= 1e-6
    )


def test_a_part_of_a_proxy_cannot_be_put_into_the_backbone() -> None:
    settings = PRUNED.replace(cut=2)
    state = random_state(settings, proxy_weights(settings, random_model(FULL).state_dict()))
    assert refused_field(lambda: insert_into_backbone(settings, state)) == "cut"


def test_vit_bs_proxy_is_as_large_as_in_fedpfts_paper() -> None:
    # 81 M and 47 M in arXiv 2404.11536: parameters of the blocks, in units of 2^20.
    full = ModelPlan(backbone="vit_base_patch16_224", image_size=224, cut=12, prompt_count=0)
    proxy = full.replace(mlp_widths=FedPFT().narrow([3072] * 12))
    numbers, pruned = (
        sum(p.numel() for p in Head(settings).blocks.parameters()) for settings in (full, proxy)
    )
    block = 4 * 768**2 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert numbers == 12 * block
    assert pruned == 12 * block - 10 * (2 * 768 + 1) * (3072 - 768)
    assert (numbers >> 20, pruned >> 20) == (81, 47)


def test_a_proxy_may_lack_blocks_and_neurons() -> None:
    both = DROPPED.replace(mlp_widths=(0, 40, 0, 40))
    weights = random_model(FULL).state_dict()
    proxy = proxy_weights(both, weights)
    narrow = proxy_weights(FULL.replace(mlp_widths=(0, 0, 40, 0, 0, 40)), weights)
    for place, number in enumerate(both.blocks):
        prefix = f"blocks.{place}."
        for name in (name for name in proxy if name.startswith(prefix)):
            assert torch.equal(proxy[name], narrow[name.replace(prefix, f"blocks.{number}.")])


@given(st.integers(2, 48), st.data())
def test_kept_blocks_are_in_order_and_evenly_spaced(depth: int, data: st.DataObject) -> None:
    ends = data.draw(st.integers(1, depth // 2))
    count = data.draw(st.integers(2 * ends, depth))
    kept = OffsiteTuning(ends=ends, blocks=count).keep(depth)
    assert len(kept) == count
    assert list(kept) == sorted(set(kept))
    assert set(kept) >= {*range(ends), *range(depth - ends, depth)}
    middle = [number for number in kept if ends <= number < depth - ends]
    gaps = {after - before for before, after in itertools.pairwise(middle)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("tune", {"tune": "bias"}),
        ("tune", {"tune": "full"}),
        ("prompt_depth", {"prompt_depth": "deep", "prompt_count": 2}),
        ("prompt_at", {"prompt_at": "cut", "prompt_count": 2, "tune": "tail", "cut": 2}),
    ],
)
def test_what_only_a_proxy_has_cannot_be_put_into_the_backbone(
    field: str, changes: dict[str, object]
) -> None:
    settings = PRUNED.replace(**changes)
    assert refused_field(lambda: ProxyServer().check(RunPlan(model=settings))) == field
    state = random_state(settings, proxy_weights(settings, random_model(FULL).state_dict()))
    assert refused_field(lambda: insert_into_backbone(settings, state)) == field
