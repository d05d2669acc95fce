"""The values of `tune`: sizes, initial values, gradients and exports."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from protocol.plan import ModelPlan
from split_model.backbone.weights import prepare_backbone
from split_model.checkpoints.export import export_model, load_exported
from split_model.checkpoints.head_file import read_head_file, write_head_file
from split_model.checkpoints.state import (
    apply_state,
    body_tensors,
    device_shapes,
    head_tensors,
    initial_state,
    read_body,
    read_state,
    state_shapes,
    tail_tensors,
)
from split_model.errors import WeightsMismatchError
from split_model.parts.build import (
    Layered,
    build_body,
    build_head,
    build_tail,
    build_tunable_body,
    frozen_names,
)
from split_model.parts.head import Head
from split_model.parts.tail import Tail
from tests.support.uncut_model import Hooks, difference, random_model, reduced, refused_field

WHOLE = ModelPlan(
    backbone="vit_base_patch16_224", image_size=224, cut=12, num_classes=100, prompt_count=0
)

DEEP = {"prompt_count": 10, "prompt_depth": "deep"}


@pytest.mark.parametrize(
    ("method", "changes", "numbers", "millions"),
    [
        ("full", {"tune": "full"}, 85_875_556, "85.88"),
        ("head", {"tune": "classifier"}, 76_900, "0.077"),
        ("bias", {"tune": "bias"}, 179_812, "0.18"),
        ("adapter", {"tune": "adapter"}, 225_220, "0.23"),
        ("prompt", {"tune": "classifier", **DEEP}, 169_060, "0.169"),
    ],
)
def test_fedpefts_prototypes_are_as_large_as_in_its_paper(
    method: str, changes: dict[str, object], numbers: int, millions: str
) -> None:
    # Table 1 of arXiv 2210.01708: ViT-B/16, 100 classes. Shapes alone, no memory for weights.
    shapes = state_shapes(WHOLE.replace(**changes))
    tuned = sum(math.prod(shape) for shape in shapes.values())
    assert tuned == numbers
    digits = len(millions.split(".")[1])
    assert f"{tuned / 1e6:.{digits}f}" == millions


TUNES = ["tail", "classifier", "bias", "adapter", "full"]

NAMES = [
    "vit_base_patch16_224",
    "vit_base_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_base_patch16_dinov3",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tune", TUNES)
def test_each_tensor_is_either_tuned_or_frozen(name: str, tune: str) -> None:
    settings = reduced(name).replace(tune=tune, cut=1, tail_blocks=1, prompt_count=0)
    state, frozen = state_shapes(settings), set(frozen_names(settings))
    for prefix, part in (("head.", Head(settings)), ("tail.", Tail(settings))):
        tuned, names = {n.removeprefix(prefix) for n in state if n.startswith(prefix)}, part.names()
        assert tuned <= set(names)
        assert set(names) - tuned <= frozen
    if tune == "full":
        assert not frozen
    if tune == "bias":
        assert all("bias" in n or n.startswith("tail.head.") for n in state)
        biases = [n for n in random_model(settings).state_dict() if n.split(".")[-1] == "bias"]
        assert {n.split(".", 1)[1] for n in state} >= set(biases)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tune", TUNES)
def test_exactly_the_tuned_tensors_are_trainable(name: str, tune: str) -> None:
    settings = reduced(name).replace(tune=tune, cut=2, adapter_width=5)
    weights = random_model(settings).state_dict()
    before = {key: value.clone() for key, value in weights.items()}
    state = initial_state(settings, weights, seed=0)
    head = build_head(settings, Layered(head_tensors(state), weights))
    tail = build_tail(settings, Layered(tail_tensors(state), weights))
    prompts = torch.nn.Parameter(state["prompts"].clone())
    read = read_state(tail, prompts, head)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())
    trainable = sum(
        parameter.numel()
        for parameter in [*head.parameters(), *tail.parameters(), prompts]
        if parameter.requires_grad
    )
    assert trainable == sum(math.prod(shape) for shape in state_shapes(settings).values())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 24, 24, generator=generator)
    tail(head(images, prompts)).square().sum().backward()
    for parameter in [*head.parameters(), *tail.parameters()]:
        assert parameter.requires_grad or parameter.grad is None
    moved = {key: value + 1 for key, value in state.items()}
    apply_state(tail, prompts, moved, head)
    again = read_state(tail, prompts, head)
    assert all(torch.equal(again[key], value) for key, value in moved.items())
    assert all(torch.equal(weights[key], value) for key, value in before.items())


def test_a_tuned_head_is_required() -> None:
    settings = reduced("vit_base_patch16_224").replace(tune="bias", cut=1)
    weights = random_model(settings).state_dict()
    state = initial_state(settings, weights, seed=0)
    tail = build_tail(settings, weights)
    with pytest.raises(WeightsMismatchError):
        read_state(tail, None)
    with pytest.raises(WeightsMismatchError):
        apply_state(tail, None, state)


def test_all_methods_begin_with_the_same_classifier_and_the_backbone_s_function() -> None:
    plain = reduced("vit_base_patch16_224").replace(cut=2, prompt_count=0)
    model = random_model(plain)
    weights = model.state_dict()
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    first = initial_state(plain, weights, seed=4)
    model.head.load_state_dict({"weight": first["tail.head.weight"], "bias": torch.zeros(5)})
    for tune in TUNES:
        settings = plain.replace(tune=tune)
        state = initial_state(settings, weights, seed=4)
        assert torch.equal(state["tail.head.weight"], first["tail.head.weight"])
        head = build_head(settings, Layered(head_tensors(state), weights))
        tail = build_tail(settings, Layered(tail_tensors(state), weights))
        assert difference(tail(head(images)), model(images)) <= 1e-5
    other = initial_state(plain.replace(tune="adapter"), weights, seed=5)
    again = initial_state(plain.replace(tune="adapter"), weights, seed=4)
    name = "head.adapter.down.weight"
    assert again[name].std() > 0
    assert not torch.equal(other[name], again[name])


@pytest.mark.parametrize("name", [*NAMES, "beitv2_base_patch16_224"])
def test_deep_prompts_join_before_each_block_of_the_head(name: str) -> None:
    # The hooks put a set of prompts into each block, on both sides of the cut.
    everywhere = reduced(name).replace(prompt_at="cut", prompt_depth="deep", cut=0)
    settings = everywhere.replace(prompt_at="input", cut=2)
    model = random_model(settings)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(2, 3, 32, generator=generator)
    images = torch.randn(2, 3, 24, 24, generator=generator)
    weights = model.state_dict()
    head, tail = build_head(settings, weights), build_tail(settings, weights)
    with Hooks(model, everywhere, prompts) as uncut:
        assert difference(tail(head(images, prompts)), uncut(images)) <= 1e-5


@pytest.mark.parametrize("tune", ["classifier", "bias", "adapter", "full"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_an_exported_model_equals_the_devices_model(tune: str, dtype: str, tmp_path: Path) -> None:
    settings = reduced("vit_base_patch16_224").replace(tune=tune, cut=1, adapter_width=5)
    file = prepare_backbone(settings, "random:1", tmp_path)
    weights = load_file(file.path)
    state = initial_state(settings, weights, seed=1)
    generator = torch.Generator().manual_seed(2)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    _, _, frozen = read_head_file(write_head_file(settings, file.path, tmp_path / "head", dtype)[0])
    assert set(frozen) == set(frozen_names(settings))
    out = export_model(settings, file.path, state, tmp_path / "model", head=frozen)
    stored = load_file(out)
    assert set(stored) == {*state, *(f"backbone.{n}" for n in frozen), *_body(stored)}
    model = load_exported(out)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    head = build_head(settings, Layered(head_tensors(state), frozen))
    tail = build_tail(settings, Layered(tail_tensors(state), frozen))
    images = torch.randn(2, 3, 24, 24, generator=generator)
    expected = tail(model.body(head(images, state["prompts"])))
    assert difference(model(images), expected) <= 1e-6


def _body(stored: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in stored if name.startswith("backbone.blocks.1.")]


BODY = {"tune": "full", "tune_body": True, "prompt_count": 0}


def test_with_a_tuned_body_all_parameters_are_in_the_state() -> None:
    settings = WHOLE.replace(cut=2, tail_blocks=1, **BODY)
    shapes = state_shapes(settings)
    assert sum(math.prod(shape) for shape in shapes.values()) == 85_875_556
    body = [name for name in shapes if name.startswith("body.")]
    assert sum(math.prod(shapes[name]) for name in body) == 9 * (12 * 768**2 + 13 * 768)
    assert device_shapes(settings).keys() == shapes.keys() - set(body)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_training_a_body_leaves_the_backbone_unchanged_and_is_exported(
    name: str, tmp_path: Path
) -> None:
    settings = reduced(name).replace(cut=1, **BODY)
    file = prepare_backbone(settings, "random:1", tmp_path)
    weights = load_file(file.path)
    before = {key: value.clone() for key, value in weights.items()}
    state = initial_state(settings, weights, seed=1)
    body = build_tunable_body(settings, Layered(body_tensors(state), weights))
    tokens = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    frozen = build_body(settings, weights)
    assert torch.equal(body(tokens), frozen(tokens))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
    body(tokens).square().sum().backward()
    optimizer.step()
    moved = read_body(body)
    assert moved.keys() == {key for key in state if key.startswith("body.")}
    assert all(torch.equal(weights[key], value) for key, value in before.items())
    model = load_exported(
        export_model(settings, file.path, state | moved, tmp_path / "model.safetensors")
    )
    assert torch.equal(model.body(tokens), body(tokens))
    assert not torch.equal(model.body(tokens), frozen(tokens))


@pytest.mark.parametrize("wrong", [{"tune": "tail"}, {"prompt_count": 1}, {"cut": 12}])
def test_a_body_that_cannot_be_tuned_is_refused_by_name(wrong: dict[str, object]) -> None:
    changes = {"cut": 2, **BODY, **wrong}
    assert refused_field(lambda: state_shapes(WHOLE.replace(**changes))) == "tune_body"
