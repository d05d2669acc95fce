"""The device's parts of the model, and the parts that it never loads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edge_client.data.batches import BatchReader, Preprocessing
from edge_client.model import preprocessing_of
from edge_client.torch_model import TorchModel, read
from protocol.errors import MalformedFrame
from protocol.plan import ModelPlan
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.metadata import image_preparation
from split_model.checkpoints.state import load_state, save_state
from split_model.parts.build import build_body
from tests.support.edge import SMALL, device_model, files, image_set


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that tensors take while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self._seen = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._seen:
                    self._seen[storage.data_ptr()] = storage
                    self.nbytes += storage.nbytes()
        return result


def tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in state.items()}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in [*module.parameters(), *module.buffers()])


def test_the_body_is_never_allocated() -> None:
    split = SMALL.model_copy(update={"backbone": "vit_tiny_patch16_224"})
    files(split)
    with Allocations() as taken:
        model = device_model(split)
    width, hidden = 192, 768
    block = 4 * width + (3 * width * width + 3 * width) + (width * width + width)
    block += 2 * width * hidden + hidden + width
    embedding = 3 * 16 * 16 * width + width + width + 5 * width
    tail = 2 * width + 3 * width + 3
    assert size(model.head) == embedding + block
    assert size(model.tail) == tail
    assert model.prompts.numel() == 4 * width
    assert list(model.head.blocks) == ["0"]
    assert list(model.tail.blocks) == []
    for part in (model.head, model.tail):
        assert all(p.device.type == "cpu" for p in [*part.parameters(), *part.buffers()])
        assert len(part.trunk.blocks) == 0
    body = build_body(split, open_backbone(files(split).backbone))
    assert size(body) == 11 * block
    expected_bytes = 4 * (embedding + block + tail)
    assert expected_bytes <= taken.nbytes < 1.1 * expected_bytes < 4 * size(body) / 4
    assert files(split).head.stat().st_size < 4 * (embedding + block) + 8192


def test_only_prompts_and_tail_are_trained() -> None:
    model = device_model()
    assert not any(p.requires_grad for p in model.head.parameters())
    assert all(p.requires_grad for p in model.tail.parameters())
    assert model.prompts.requires_grad


def test_the_state_is_the_server_s_and_a_copy() -> None:
    model = device_model()
    state, given = model.state(), load_state(files().state)
    assert set(state) == set(given)
    assert all(np.array_equal(state[name], given[name]) for name in given)
    state["prompts"][:] = 0
    assert torch.equal(model.prompts, given["prompts"])


def test_a_new_state_is_taken_in_place(tmp_path: Path) -> None:
    model = device_model()
    parameters = [model.prompts, *model.tail.parameters()]
    other = {name: value + 1 for name, value in model.state().items()}
    save_state(tensors(other), tmp_path / "other.safetensors")
    model.load_global_state(tmp_path / "other.safetensors")
    assert all(np.array_equal(model.state()[name], other[name]) for name in other)
    now = [model.prompts, *model.tail.parameters()]
    assert all(a is b for a, b in zip(parameters, now, strict=True))


def test_the_mean_token_is_the_mean_over_images_and_patches() -> None:
    model = device_model()
    before = model.prompts.detach().clone()
    samples = BatchReader(image_set(150), model.preprocessing)  # more than one chunk
    model.add_mean_token(samples)
    images, _ = read(samples, np.arange(150))
    embedded = model.head.embed(images)  # (150, 1 + 4, 64), the class token first
    mean = embedded[:, 1:].double().mean(dim=(0, 1)).float()
    assert torch.allclose(model.prompts - before, mean.expand(4, -1), atol=1e-5)
    assert model.prompts.requires_grad


def test_no_prompts_no_mean_token() -> None:
    model = device_model(SMALL.model_copy(update={"prompt_count": 0}))
    assert model.prompts is None
    model.add_mean_token(BatchReader(image_set(), model.preprocessing))
    assert "prompts" not in model.state()


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (
            "vit_small_patch14_dinov2",
            Preprocessing(42, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic"),
        ),
        (
            "vit_base_patch16_224_miil",
            Preprocessing(48, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear"),
        ),
    ],
)
def test_images_are_prepared_as_timm_records_it_for_the_backbone(
    backbone: str, expected: Preprocessing
) -> None:
    split = ModelPlan(backbone=backbone, image_size=expected.image_size)
    assert preprocessing_of(split, image_preparation(split)) == expected


def test_a_head_of_another_model_is_refused() -> None:
    paths = files()
    for change in ({"cut": 2}, {"image_size": 48}, {"backbone": "vit_small_patch16_224"}):
        with pytest.raises(MalformedFrame, match="another model"):
            TorchModel.load(SMALL.model_copy(update=change), paths.head, paths.state)


def test_a_state_of_another_model_is_refused() -> None:
    paths = files()
    for change in ({"num_classes": 4}, {"prompt_count": 5}):
        with pytest.raises(MalformedFrame, match="cannot be used"):
            TorchModel.load(SMALL.model_copy(update=change), paths.head, paths.state)


def test_prompts_at_the_cut_are_not_on_the_device(tmp_path: Path) -> None:
    model = device_model(SMALL.model_copy(update={"prompt_at": "cut"}))
    assert model.prompts is None
    model.add_mean_token(BatchReader(image_set(), model.preprocessing))
    state = model.state()
    assert set(state) == set(load_state(files().state)) - {"prompts"}
    save_state(tensors(state) | {"prompts": torch.zeros(1, 4, 64)}, tmp_path / "with-prompts")
    with pytest.raises(MalformedFrame):
        model.load_global_state(tmp_path / "with-prompts")


def test_damaged_files_are_typed_errors(tmp_path: Path) -> None:
    paths = files()
    for content in (
        b"",
        b"\xff" * 100,
        paths.head.read_bytes()[:-100],
        paths.state.read_bytes(),
    ):
        (tmp_path / "head").write_bytes(content)
        with pytest.raises(MalformedFrame, match="cannot be used"):
            TorchModel.load(SMALL, tmp_path / "head", paths.state)
    for content in (b"", paths.state.read_bytes()[:-9], paths.head.read_bytes()):
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(MalformedFrame, match="cannot be used"):
            TorchModel.load(SMALL, paths.head, tmp_path / "state")
        with pytest.raises(MalformedFrame, match="cannot be used"):
            device_model().load_global_state(tmp_path / "state")


def test_a_state_of_another_shape_changes_nothing(tmp_path: Path) -> None:
    model = device_model()
    before = model.state()
    save_state(tensors(before) | {"prompts": torch.zeros(5, 64)}, tmp_path / "wrong")
    with pytest.raises(MalformedFrame):
        model.load_global_state(tmp_path / "wrong")
    assert all(np.array_equal(model.state()[name], before[name]) for name in before)
