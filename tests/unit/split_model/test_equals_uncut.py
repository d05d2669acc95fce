"""Outputs and gradients of the split model equal the uncut ones, for all names and cuts."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import skeleton, supported_backbones
from split_model.layers.prompts import prompt_shape
from split_model.parts.build import build_body, build_head, build_tail
from tests.support.uncut_model import Hooks, difference, random_model, reduced, signature

OUTPUT_TOLERANCE = 1e-5

GRADIENT_TOLERANCE = 1e-4

_verified: set[int] = set()

_models: dict[str, Any] = {}

# cut, tail_blocks, prompt_at, prompt_depth for a depth of two
ALL_CUTS = [
    *((cut, tail, "input", "shallow") for tail in (0, 1, 2) for cut in range(3 - tail)),
    *((cut, tail, "cut", "shallow") for cut, tail in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2))),
    *((cut, tail, "cut", "deep") for cut, tail in ((0, 0), (1, 0), (0, 1))),
]

# Names of one family differ in embedding, positions and output, not in how they are cut.
CUTS_OF_EACH_NAME = [
    (0, 0, "input", "shallow"),
    (1, 1, "input", "shallow"),
    (1, 0, "cut", "shallow"),
    (0, 0, "cut", "deep"),
]

# Convolutional stems are slow, and all in the head: one case for each place of the prompts.
WITH_STEM = [(0, 0, "input", "shallow"), (1, 0, "cut", "shallow")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(
    parts: tuple[Any, ...], images: Tensor, prompts: Tensor | None, num_tokens: int | None = None
) -> Tensor:
    head, body, tail = parts
    at_input = head.settings.prompt_at == "input"
    smashed = head(images, prompts if at_input else None)
    logits: Tensor = tail(body(smashed, None if at_input else prompts, num_tokens))
    return logits


def check(model: Any, settings: ModelPlan) -> None:
    weights = model.state_dict()
    side = settings.image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, side, side, generator=generator)
    start = torch.randn(prompt_shape(settings), generator=generator)
    weighting = torch.randn(2, settings.num_classes, generator=generator)

    tail = build_tail(settings, weights)
    parts = (build_head(settings, weights), build_body(settings, weights), tail)
    with torch.no_grad():
        assert difference(_run(parts, images, None), model(images)) <= OUTPUT_TOLERANCE

    prompts = start.clone().requires_grad_()
    # The gradients are those of a body that computes only what the tail reads.
    num_tokens = None if tail.sizes.averaged else tail.num_tokens
    logits = _run(parts, images, prompts, num_tokens)
    with torch.no_grad():
        assert difference(_run(parts, images, prompts), logits) <= OUTPUT_TOLERANCE
    (logits * weighting).sum().backward()

    expected = start.clone().requires_grad_()
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tail.names())
    with Hooks(model, settings, expected) as uncut:
        reference = uncut(images)
        (reference * weighting).sum().backward()
    assert difference(logits, reference) <= OUTPUT_TOLERANCE
    assert prompts.grad is not None
    assert expected.grad is not None
    assert expected.grad.abs().max() > 0
    assert difference(prompts.grad, expected.grad) <= GRADIENT_TOLERANCE
    of_uncut = dict(model.named_parameters())
    of_tail = tail.state_dict(keep_vars=True)
    for name, key in tail.names().items():
        mine, theirs = of_tail[key].grad, of_uncut[name].grad
        if name == "rope.freqs":  # shared with head and body: only the tail's blocks compare
            first = len(model.blocks) - settings.tail_blocks
            mine, theirs = mine[:, first:], theirs[:, first:]
        if theirs is None:
            assert mine is None
        else:
            assert difference(mine, theirs) <= GRADIENT_TOLERANCE, name


def _with(settings: ModelPlan, case: tuple[Any, ...]) -> ModelPlan:
    cut, tail_blocks, prompt_at, prompt_depth = case
    return settings.replace(
        cut=cut,
        tail_blocks=tail_blocks,
        prompt_at=prompt_at,
        prompt_depth=prompt_depth,
    )


@pytest.mark.parametrize("name", supported_backbones())
def test_each_architecture(name: str) -> None:
    settings = reduced(name)
    kind = signature(skeleton(settings))
    if kind in _verified:
        return  # the same model as a name before it, at this size
    model = random_model(settings)
    for case in WITH_STEM if hasattr(model.patch_embed, "backbone") else CUTS_OF_EACH_NAME:
        check(model, _with(settings, case))
    _verified.add(kind)


@pytest.mark.parametrize("case", ALL_CUTS, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_base_patch14_reg4_dinov2",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch16_siglip_224",
        "eva02_base_patch14_224",
        "vit_base_patch16_rope_mixed_224",
        "vit_base_patch16_dinov3",
        "beit_base_patch16_224",
    ],
)
def test_each_cut(name: str, case: tuple[Any, ...]) -> None:
    settings = _with(reduced(name), case)
    if name not in _models:
        _models[name] = random_model(settings)
    check(_models[name], settings)


@pytest.mark.parametrize(
    "case",
    [
        (1, 0, "cut", "deep"),
        (1, 1, "cut", "shallow"),
        (2, 1, "input", "deep"),
        (3, 0, "input", "shallow"),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_some_blocks_with_narrower_mlps(case: tuple[Any, ...]) -> None:
    overrides = (("depth", 5), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8))
    backbone = reduced("vit_base_patch16_224").replace(model_overrides=overrides)
    model = random_model(backbone)
    model.blocks = torch.nn.Sequential(*(model.blocks[number] for number in (0, 2, 3)))
    generator = torch.Generator().manual_seed(2)
    for place, width in ((1, 40), (2, 8)):
        mlp = model.blocks[place].mlp
        mlp.fc1, mlp.fc2 = torch.nn.Linear(32, width), torch.nn.Linear(width, 32)
        for parameter in mlp.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    check(model, _with(backbone.replace(blocks=(0, 2, 3), mlp_widths=(0, 40, 8)), case))
