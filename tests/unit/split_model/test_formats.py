"""An exported model computes the same in every format, or is not written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.errors import InternalError, InvalidField
from protocol.plan import ModelPlan
from split_model.backbone.libraries import timm
from split_model.checkpoints import formats
from split_model.checkpoints.export import ExportedModel
from split_model.checkpoints.export_format import ExportFormat, choose_format
from split_model.checkpoints.formats import write_onnx, write_program, write_timm
from split_model.checkpoints.metadata import image_preparation
from split_model.checkpoints.state import initial_state
from tests.support.uncut_model import random_model, reduced

onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = ("ash", "birch", "cedar", "elm", "fir")


def exported(plan: ModelPlan) -> ExportedModel:
    weights = random_model(plan).state_dict()
    state = initial_state(plan, weights, seed=1)
    return ExportedModel(plan, weights, state, image_preparation(plan), CLASSES)


def images(model: ExportedModel, count: int) -> torch.Tensor:
    side = model.settings.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def logits(model: ExportedModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        computed: torch.Tensor = model(pixels)
    return computed


PROMPTED = reduced("vit_base_patch16_224")

DEPTHS = PROMPTED.replace(prompt_count=0, depths=2, tail_blocks=0)


@pytest.mark.parametrize(
    "plan", [PROMPTED, DEPTHS, reduced("beit_base_patch16_224")], ids=["prompts", "depths", "beit"]
)
def test_onnx_and_torch_export_compute_the_models_logits_for_any_batch(
    plan: ModelPlan, tmp_path: Path
) -> None:
    model = exported(plan)
    write_onnx(model, tmp_path / "model.onnx")
    write_program(model, tmp_path / "model.pt2")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 5):
        pixels = images(model, count)
        expected = logits(model, pixels)
        (computed,) = session.run(["logits"], {"images": pixels.numpy()})
        np.testing.assert_allclose(computed, expected.numpy(), atol=1e-5)
        torch.testing.assert_close(program(pixels), expected, atol=1e-5, rtol=0)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["class_names"] == '["ash", "birch", "cedar", "elm", "fir"]'
    assert metadata["image_size"] == str(plan.image_size)


def test_timm_loads_the_folder_of_a_model_that_it_knows(tmp_path: Path) -> None:
    plan = PROMPTED.replace(prompt_count=0, tune="bias")
    model, folder = exported(plan), tmp_path / "model"
    write_timm(model, folder)
    write_timm(model, folder)  # replaces the first
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = images(model, 2)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), logits(model, pixels))
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (PROMPTED, "soft prompts"),
        (DEPTHS, "several blocks"),
        (PROMPTED.replace(prompt_count=0, tune="lora"), "lora"),
    ],
    ids=["prompts", "depths", "lora"],
)
def test_timms_format_is_refused_for_parts_that_timm_lacks(
    plan: ModelPlan, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidField, match=reason) as caught:
        write_timm(exported(plan), tmp_path / "model")
    assert caught.value.limit == ["safetensors", "onnx", "pt2"]
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_other_logits_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exported(DEPTHS)
    export = torch.onnx.export

    def wrong(module: ExportedModel, *arguments: object, **options: object) -> object:
        other = exported(DEPTHS)
        with torch.no_grad():
            other.tail.state_dict()["trunk.head.bias"] += 0.5
        return export(other, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(formats.torch.onnx, "export", wrong)
    with pytest.raises(InternalError, match="differs"):
        write_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("m.safetensors", None, ExportFormat.SAFETENSORS),
        ("m.onnx", ExportFormat.ONNX, ExportFormat.ONNX),
        ("m.pt2", None, ExportFormat.PT2),
        ("m", None, ExportFormat.TIMM),
    ],
)
def test_the_name_tells_the_format(
    name: str, kind: ExportFormat | None, expected: ExportFormat
) -> None:
    assert choose_format(Path(name), kind) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.pt", None), ("m.onnx", ExportFormat.SAFETENSORS), ("m", ExportFormat.PT2)],
)
def test_a_name_of_another_format_is_refused(name: str, kind: ExportFormat | None) -> None:
    with pytest.raises(InvalidField) as caught:
        choose_format(Path(name), kind)
    assert caught.value.field == "out"
    assert caught.value.value == name
