"""Layer-wise distillation: the loss matches one by hand and falls; other tensors stay."""

import pytest
import torch
from torch import Tensor

from split_model.parts.build import build_head
from tests.support.uncut_model import random_model, reduced
from tuning_methods.proxies.distillation import (
    Trace,
    distil,
    distil_proxy,
    layer_loss,
    trace_layers,
)
from tuning_methods.proxies.settings import DistillationSettings
from tuning_methods.proxies.weights import proxy_weights

DEPTH = 4

FULL = reduced("vit_base_patch16_224").replace(
    cut=DEPTH,
    prompt_count=0,
    model_overrides=(("depth", DEPTH), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8)),
)

PRUNED = FULL.replace(mlp_widths=(0, 32, 32, 0))

DROPPED = FULL.replace(blocks=(0, 2, 3), cut=3, tune="lora", lora_ends=1)

SETTINGS = DistillationSettings(epochs=4, batch_size=8, learning_rate=5e-3)


def images() -> Tensor:
    return torch.randn(24, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_the_loss_equals_a_calculation_by_hand() -> None:
    def tokens(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)

    teacher = Trace({"2": tokens(3, 4), "5": tokens(1, 1)}, {"2": tokens(2, 0), "5": tokens(1, 3)})
    student = Trace({"0": tokens(0, 4), "1": tokens(1, 3)}, {"0": tokens(2, 2), "1": tokens(1, 3)})
    # Blocks: (9 + 0) / (9 + 16) and (0 + 4) / (1 + 1); MLPs: (0 + 4) / (4 + 0) and 0.
    loss = layer_loss(teacher, student, [("2", "0"), ("5", "1")], mlp_weight=0.5)
    assert loss.item() == pytest.approx((9 / 25 + 2 + 0.5 * 1) / 2)


def test_a_trace_equals_the_outputs_of_timms_blocks_and_mlps() -> None:
    model = random_model(FULL)
    head = build_head(FULL, {n: t.clone() for n, t in model.state_dict().items()})
    expected: dict[str, Tensor] = {}
    model.blocks[2].mlp.register_forward_hook(lambda _, __, out: expected.update(mlp=out))
    model.blocks[2].register_forward_hook(lambda _, __, out: expected.update(block=out))
    with torch.no_grad():
        model(images()[:2])
        trace = trace_layers(head, images()[:2])
    assert torch.allclose(trace.blocks["2"], expected["block"], atol=1e-5)
    assert torch.allclose(trace.mlps["2"], expected["mlp"], atol=1e-5)
    assert len(trace.blocks) == DEPTH


@pytest.mark.parametrize("settings", [PRUNED, DROPPED])
def test_distillation_lowers_the_loss_and_changes_nothing_else(settings: object) -> None:
    weights = {n: t.clone() for n, t in random_model(FULL).state_dict().items()}
    before = {n: t.clone() for n, t in weights.items()}
    start = proxy_weights(settings, weights)
    distilled = distil_proxy(settings, weights, images(), SETTINGS, seed=0)
    assert distilled.keys() == start.keys()
    assert all(torch.equal(weights[n], t) for n, t in before.items())
    changed = {n for n, t in distilled.items() if not torch.equal(t, start[n])}
    if settings is PRUNED:
        layers = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        assert changed == {f"blocks.{b}.mlp.{layer}" for b in (1, 2) for layer in layers}
    else:
        assert {n.split(".")[1] for n in changed} == {"1"}
    pairs = [(str(b), str(b)) for b in range(DEPTH)]
    if settings is DROPPED:
        pairs = [("1", "0"), ("2", "1"), ("3", "2")]  # the proxy keeps blocks 0, 2 and 3

    @torch.no_grad()
    def loss(proxy: dict[str, Tensor]) -> float:
        target = trace_layers(build_head(FULL, weights), images())
        student = build_head(settings.untuned(), proxy)
        return float(layer_loss(target, trace_layers(student, images()), pairs, 0.01))

    assert loss(distilled) < 0.9 * loss(start)
    again = distil_proxy(settings, weights, images(), SETTINGS, seed=0)
    assert all(torch.equal(again[n], t) for n, t in distilled.items())


def test_without_epochs_the_proxy_has_the_backbones_tensors() -> None:
    weights = random_model(FULL).state_dict()
    proxy = distil_proxy(PRUNED, weights, images()[:0], DistillationSettings(), seed=0)
    assert all(torch.equal(proxy[n], t) for n, t in proxy_weights(PRUNED, weights).items())


def test_the_loss_falls_epoch_by_epoch() -> None:
    weights = random_model(FULL).state_dict()
    teacher, student = build_head(FULL, weights), build_head(PRUNED, proxy_weights(PRUNED, weights))
    trained = [*student.blocks["1"].mlp.parameters(), *student.blocks["2"].mlp.parameters()]
    pairs = [(str(b), str(b)) for b in range(DEPTH)]
    losses = distil(teacher, student, pairs, trained, images(), SETTINGS, seed=0)
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == SETTINGS.epochs
