"""A run on a proxy in a comparison: the images for distillation, and the backbone's accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_client.data.dataset import Dataset
from edge_client.data.sources import load_dataset
from protocol.plan import RunPlan
from sfprompt_bench.compare.proxies import (
    backbone_accuracy,
    with_backbone_accuracy,
    write_distillation_images,
)
from split_model.backbone.tensor_file import TensorFile
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.state import initial_state
from tests.support.edge import SMALL, image_set
from tuning_methods.proxies.weights import proxy_weights

PROXY: dict[str, Any] = {
    "mlp_widths": (0, *[48] * 4, 0),
    "cut": 6,
    "prompt_count": 0,
    "tune": "lora",
}

SETTINGS = RunPlan(model=SMALL.model_copy(update=PROXY))


def test_images_to_distil_on_come_from_the_named_set(tmp_path: Path) -> None:
    method = {"distillation": {"epochs": 1, "images": "digits", "samples": 30}}
    settings = RunPlan.model_validate({**SETTINGS.model_dump(), "method": method})
    write_distillation_images(settings, tmp_path)
    pixels = TensorFile(tmp_path / "distillation" / "digits.safetensors")["images"]
    assert (pixels.dtype, pixels.shape[:2]) == (torch.uint8, (30, 3))
    images = load_dataset("digits", seed=0).train
    known_images = {images.image(index).tobytes() for index in range(len(images))}
    assert all(bytes(image.contiguous().numpy()) in known_images for image in pixels)


def test_without_a_named_set_no_images_are_written(tmp_path: Path) -> None:
    write_distillation_images(SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_backbone_s_accuracy_is_measured(tmp_path: Path) -> None:
    split = SETTINGS.model
    weights = open_backbone(prepare_backbone(split, "random:0", tmp_path).path)
    state = initial_state(split, proxy_weights(split, weights), seed=0)
    # A classifier that says "green" whatever it reads: right for a third of 9, 4 of 10 for red.
    state["tail.head.weight"].zero_()
    for label, right in ((1, 3), (0, 4)):
        state["tail.head.bias"].copy_(torch.eye(3)[label])
        data = Dataset(image_set(3), image_set(10 if label == 0 else 9, seed=1))
        result = backbone_accuracy(SETTINGS, state, data, tmp_path)
        assert result == right / len(data.test)


def test_figures_of_a_run_on_a_proxy_have_both_accuracies() -> None:
    points = [{"round": 1, "bytes": 5, "accuracy": 0.3}, {"round": 2, "bytes": 9, "accuracy": 0.4}]
    run = {"accuracy": 0.4, "accuracy_worst_client": 0.1, "curve": points, "bytes_total": 9}
    result = with_backbone_accuracy(run, 0.7)
    assert (result["accuracy"], result["accuracy_proxy"], result["bytes_total"]) == (0.7, 0.4, 9)
    assert [point["accuracy"] for point in result["curve"]] == [None, 0.7]
    assert result["accuracy_worst_client"] is None
    assert points[1]["accuracy"] == 0.4
