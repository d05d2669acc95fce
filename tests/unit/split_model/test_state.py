"""Tuned states, prepared backbones, head files and exports survive a write and a read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.export import export_model, load_exported
from split_model.checkpoints.head_file import HeadDtype, read_head_file, write_head_file
from split_model.checkpoints.metadata import head_plan
from split_model.checkpoints.state import (
    apply_state,
    initial_state,
    load_state,
    read_state,
    save_state,
    state_shapes,
    tail_tensors,
)
from split_model.errors import TensorFileError, WeightsMismatchError, WeightSourceError
from split_model.parts.build import build_body, build_head, build_tail
from split_model.parts.cost import part_bytes
from split_model.parts.head import Head
from tests.support.uncut_model import difference, random_model, reduced

SETTINGS = reduced("vit_base_patch16_224").replace(tail_blocks=1)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return initial_state(SETTINGS, random_model(SETTINGS).state_dict(), seed=3)


def test_only_classifier_and_prompts_of_an_initial_state_are_not_pretrained() -> None:
    model = random_model(SETTINGS)
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    state = initial_state(SETTINGS, weights, seed=3)
    assert {name: tuple(t.shape) for name, t in state.items()} == state_shapes(SETTINGS)
    assert torch.equal(state["tail.norm.weight"], weights["norm.weight"])
    assert torch.equal(state["tail.blocks.1.attn.qkv.weight"], weights["blocks.1.attn.qkv.weight"])
    assert state["tail.head.weight"].std() > 0
    assert not state["tail.head.bias"].any()
    again = initial_state(SETTINGS, weights, seed=3)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    other = initial_state(SETTINGS, weights, seed=4)
    assert not torch.equal(other["tail.head.weight"], state["tail.head.weight"])
    assert not torch.equal(other["prompts"], state["prompts"])


def test_a_state_needs_the_pretrained_tensors() -> None:
    with pytest.raises(WeightsMismatchError, match="missing"):
        initial_state(SETTINGS, {}, seed=0)


def test_apply_then_read_gives_the_state_back(state: dict[str, Tensor], tmp_path: Path) -> None:
    tail = build_tail(SETTINGS, random_model(SETTINGS, seed=9).state_dict())
    before = list(tail.parameters())
    prompts = torch.nn.Parameter(torch.zeros(3, 32))
    apply_state(tail, prompts, state)
    assert all(old is new for old, new in zip(before, tail.parameters(), strict=True))
    read = read_state(tail, prompts)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    save_state(read, tmp_path / "state")
    loaded = load_state(tmp_path / "state")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        prompts.add_(1)
    assert torch.equal(read["prompts"], state["prompts"])  # copies, no views


@pytest.mark.parametrize("fault", ["unknown", "missing", "shape"])
def test_a_state_that_does_not_fit_changes_nothing(state: dict[str, Tensor], fault: str) -> None:
    tail = build_tail(SETTINGS, random_model(SETTINGS).state_dict())
    prompts = torch.zeros(3, 32)
    before = read_state(tail, prompts)
    if fault == "unknown":
        state["tail.extra"] = torch.zeros(1)
    elif fault == "missing":
        del state["tail.norm.bias"]
    else:
        state["prompts"] = torch.zeros(4, 32)
    with pytest.raises(WeightsMismatchError):
        apply_state(tail, prompts, state)
    after = read_state(tail, prompts)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_random_weights_are_cached_and_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    global_state = torch.get_rng_state()
    file = prepare_backbone(SETTINGS, "random:1", tmp_path)
    assert torch.equal(global_state, torch.get_rng_state())
    assert file.nbytes == file.path.stat().st_size
    assert file.parameters == part_bytes(SETTINGS).backbone - 5 * 33
    written = file.path.stat().st_mtime_ns
    assert prepare_backbone(SETTINGS.replace(cut=0), "random:1", tmp_path) == file
    assert file.path.stat().st_mtime_ns == written
    assert prepare_backbone(SETTINGS, "random:2", tmp_path).sha256 != file.sha256
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    assert prepare_backbone(SETTINGS, "random:1", tmp_path).sha256 == file.sha256
    file.path.with_suffix(".json").write_text("{}")
    assert prepare_backbone(SETTINGS, "random:1", tmp_path) == file
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_base_patch16_rope_mixed_ape_224",
        "beit_base_patch16_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_weights_from_a_file_at_another_image_size(name: str, tmp_path: Path) -> None:
    small = reduced(name)
    model = random_model(small)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    source = f"file:{tmp_path / 'weights.safetensors'}"
    same = load_file(prepare_backbone(small, source, tmp_path / "cache").path)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in same.items())
    assert not any(key.startswith("head") for key in same)
    large = small.replace(image_size=40)
    file = prepare_backbone(large, source, tmp_path / "cache")
    resized = load_file(file.path)
    expected = timm.create_model(name, img_size=40, num_classes=0, **dict(small.model_overrides))
    assert {key: t.shape for key, t in resized.items()} == {
        key: t.shape for key, t in expected.state_dict().items()
    }
    build_body(large, open_backbone(file.path))


def test_a_changed_file_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(random_model(SETTINGS, seed=1).state_dict(), path)
    first = prepare_backbone(SETTINGS, f"file:{path}", tmp_path / "cache")
    save_file(random_model(SETTINGS, seed=2).state_dict(), path)
    assert prepare_backbone(SETTINGS, f"file:{path}", tmp_path / "cache").sha256 != first.sha256


@pytest.mark.parametrize(
    "source", ["", "web", "random:", "random:x", "file:", "file:/no/such", "hub:"]
)
def test_wrong_sources_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(WeightSourceError) as caught:
        prepare_backbone(SETTINGS, source, tmp_path)
    assert caught.value.value == source


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(b"\x80\x04")
    with pytest.raises(WeightSourceError, match=r"a \.safetensors file"):
        prepare_backbone(SETTINGS, f"file:{pickled}", tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no safetensors")
    with pytest.raises(WeightSourceError, match="readable"):
        prepare_backbone(SETTINGS, f"file:{broken}", tmp_path)
    partial = tmp_path / "partial.safetensors"
    weights = random_model(SETTINGS).state_dict()
    del weights["blocks.0.norm1.weight"]
    save_file(weights, partial)
    with pytest.raises(WeightSourceError, match=r"blocks\.0\.norm1\.weight"):
        prepare_backbone(SETTINGS, f"file:{partial}", tmp_path)


def test_a_device_builds_its_head_from_the_head_file_alone(tmp_path: Path) -> None:
    file = prepare_backbone(SETTINGS, "random:1", tmp_path)
    path, digest = write_head_file(SETTINGS, file.path, tmp_path / "head.safetensors")
    assert len(digest) == 64
    assert set(load_file(path)) == set(Head(SETTINGS).names())
    stored, images, tensors = read_head_file(path)
    head = build_head(SETTINGS, tensors)
    assert stored == head_plan(SETTINGS)
    assert images.mean == (0.5, 0.5, 0.5)
    assert images.interpolation == "bicubic"
    assert head(torch.zeros(1, 3, 24, 24)).shape == (1, 10, 32)
    assert write_head_file(SETTINGS, file.path, tmp_path / "again")[1] == digest


def test_runs_with_the_same_head_have_equal_head_files(tmp_path: Path) -> None:
    settings = reduced("vit_base_patch16_224")
    source = prepare_backbone(settings, "random:1", tmp_path)

    def digest(dtype: HeadDtype = "int4", **changes: Any) -> str:
        path = tmp_path / "head.safetensors"
        return write_head_file(settings.replace(**changes), source.path, path, dtype)[1]

    same: list[dict[str, Any]] = [
        {"num_classes": 3},
        {"prompt_count": 0},
        {"prompt_at": "cut", "prompt_depth": "deep", "keep_tokens": 4},
        {"prompt_init": "mean-token"},
        {"weights": "random:1"},
    ]
    assert {digest(**changes) for changes in same} == {digest()}
    others = [digest("float32"), digest(cut=0), digest(tune="classifier")]
    assert len({digest(), *others}) == 4


def _built(path: Path) -> None:
    settings, _, tensors = read_head_file(path)
    build_head(settings, tensors)


def test_broken_head_files_are_refused(tmp_path: Path) -> None:
    # Without the overrides of the tests, which no file has, the patches have 16 pixels a side.
    good = {"settings": SETTINGS.replace(image_size=32).model_dump_json(), "images": "{}"}
    cases = [
        ({}, TensorFileError),
        ({**good, "settings": "[]"}, TensorFileError),
        ({**good, "settings": '{"cut": -1}'}, TensorFileError),
        (good, TensorFileError),
        (
            {**good, "images": '{"mean": [0, 0], "std": [1, 1], "interpolation": ""}'},
            TensorFileError,
        ),
        (
            {**good, "images": '{"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": ""}'},
            WeightsMismatchError,
        ),
    ]
    for metadata, error in cases:
        save_file({"x": torch.zeros(1)}, tmp_path / "head", metadata=metadata)
        with pytest.raises(error):
            _built(tmp_path / "head")
    with pytest.raises(TensorFileError):
        read_head_file(tmp_path / "absent")


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_rope_mixed_224"])
@pytest.mark.parametrize(
    ("prompt_at", "prompt_depth", "tail_blocks"),
    [("input", "shallow", 0), ("cut", "shallow", 1), ("cut", "deep", 0)],
)
def test_an_exported_model_predicts_as_the_split_one(
    name: str, prompt_at: str, prompt_depth: str, tail_blocks: int, tmp_path: Path
) -> None:
    settings = reduced(name).replace(
        prompt_at=prompt_at,
        prompt_depth=prompt_depth,
        tail_blocks=tail_blocks,
        cut=0,
    )
    file = prepare_backbone(settings, "random:1", tmp_path)
    weights = open_backbone(file.path)
    state = initial_state(settings, weights, seed=1)
    state = {name: t + 0.3 * torch.randn(t.shape) for name, t in state.items()}  # "tuned"
    frozen = read_head_file(write_head_file(settings, file.path, tmp_path / "head")[0])[2]
    head = build_head(settings, frozen)
    body, tail = build_body(settings, weights), build_tail(settings, tail_tensors(state))
    images = torch.randn(2, 3, 24, 24)
    at_input = prompt_at == "input"
    smashed = head(images, state["prompts"] if at_input else None)
    expected = tail(body(smashed, None if at_input else state["prompts"]))

    out = export_model(settings, file.path, state, tmp_path / "model.safetensors", {"round": "2"})
    file.path.unlink()
    model = load_exported(out)
    assert difference(model(images), expected) <= 1e-6
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_prompts_the_export_is_the_timm_model(tmp_path: Path) -> None:
    settings: ModelPlan = SETTINGS.replace(prompt_count=0)
    file = prepare_backbone(settings, "random:1", tmp_path)
    weights = open_backbone(file.path)
    state = initial_state(settings, weights, seed=1)
    assert "prompts" not in state
    model = load_exported(export_model(settings, file.path, state, tmp_path / "model"))
    uncut = timm.create_model(
        settings.backbone, img_size=24, num_classes=5, **dict(settings.model_overrides)
    ).eval()
    uncut.load_state_dict({**dict(weights), **tail_tensors(state)})
    images = torch.randn(2, 3, 24, 24)
    assert difference(model(images), uncut(images)) <= 1e-5


def test_sizes_of_a_vit_base() -> None:
    settings = ModelPlan(
        backbone="vit_base_patch16_224", image_size=224, cut=3, num_classes=100, prompt_count=0
    )
    size = part_bytes(settings)
    assert size.head + size.body + size.tail == size.backbone
    assert size.backbone_bytes == 4 * 85_875_556


def test_a_resampled_bias_table_keeps_its_shape(tmp_path: Path) -> None:
    settings = reduced("beit_base_patch16_224")
    weights = {name: tensor.clone() for name, tensor in random_model(settings).state_dict().items()}
    name = "blocks.0.attn.relative_position_bias_table"
    # A ramp over the vertical distances −2 … 2, then the class token's three entries.
    ramp = torch.arange(-2.0, 3.0).repeat_interleave(5)
    weights[name] = torch.cat([ramp, torch.tensor([7.0, 8.0, 9.0])])[:, None].repeat(1, 2)
    save_file(weights, tmp_path / "weights.safetensors")
    large = settings.replace(image_size=40)
    source = f"file:{tmp_path / 'weights.safetensors'}"
    table = load_file(prepare_backbone(large, source, tmp_path / "cache").path)[name]
    assert table.shape == (9 * 9 + 3, 2)
    rows = table[:-3, 0].view(9, 9)
    assert (rows.diff(dim=0) >= 0).all()  # flat at the ends, as timm spaces the points
    assert torch.allclose(rows, rows[:, :1].expand(9, 9), atol=1e-5)
    assert rows[4, 4].abs() < 1e-5
    assert table[-3:, 0].tolist() == [7.0, 8.0, 9.0]
