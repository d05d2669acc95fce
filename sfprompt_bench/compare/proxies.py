"""Runs on a proxy: the images that the server distils on, and the backbone's final accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from edge_client.data.batches import BatchReader
from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ImageSet
from edge_client.data.pictures import parse_colour
from edge_client.data.sources import load_dataset
from edge_client.model import preprocessing_of
from edge_client.torch_model import read
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from sfprompt_bench.compare.tasks import Figures
from split_model.backbone.tensor_file import write_tensors
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.export import TunedModel
from split_model.checkpoints.metadata import image_preparation
from tuning_methods.proxies.cache import IMAGES
from tuning_methods.proxies.settings import distillation_of
from tuning_methods.proxies.weights import insert_into_backbone

_BATCH = 100


def write_distillation_images(plan: RunPlan, data_dir: Path) -> None:
    """Write the images that a run distils on into its server's folder, before the server starts.

    Raises:
        DataError: there is no data set of that name.
    """
    distillation = distillation_of(plan)
    if distillation.epochs == 0 or distillation.images == "random":
        return
    background = parse_colour(plan.model.background)
    images = load_dataset(distillation.images, seed=0, background=background).train
    generator = torch.Generator().manual_seed(derive_seed(0, "distillation-images"))
    chosen = torch.randperm(len(images), generator=generator)[: distillation.samples]
    pixels = torch.stack(
        [torch.tensor(images.image(int(index))) for index in chosen]
    )  # [N, 3, H, W]
    write_tensors(data_dir / IMAGES / f"{distillation.images}.safetensors", {"images": pixels})


def backbone_accuracy(
    plan: RunPlan, state: Mapping[str, Tensor], data: Dataset, cache_dir: Path
) -> float:
    """Measure the backbone with a run's final state on the held-out images, 0 to 1.

    Args:
        plan: of the run, which was on a proxy.
        state: its last global state.
        data: all devices' images together.
        cache_dir: folder of the run's backbones.
    """
    split, tensors = insert_into_backbone(plan.model, state)
    backbone = prepare_backbone(split, plan.model.weights, cache_dir)
    return _accuracy(TunedModel(split, open_backbone(backbone.path), tensors), data.test)


@torch.no_grad()
def _accuracy(model: TunedModel, test: ImageSet) -> float:
    preprocessing = preprocessing_of(model.settings, image_preparation(model.settings))
    images, correct = BatchReader(test, preprocessing, cache_bytes=0), 0
    for positions in torch.arange(len(images)).split(_BATCH):
        pixels, labels = read(images, positions.numpy())
        correct += int((model(pixels).argmax(dim=1) == labels).sum())
    return correct / len(images)


def with_backbone_accuracy(figures: Figures, accuracy: float) -> Figures:
    """Replace the proxy's accuracy by the backbone's in a run's figures.

    Devices measure the proxy in every round; the backbone is measured once, at the end, so that
    the curve has one point. The devices' last measurement becomes ``accuracy_proxy``.
    """
    curve = [{**point, "accuracy": None} for point in figures["curve"]]
    if curve:
        curve[-1]["accuracy"] = accuracy
    return figures | {
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "accuracy_proxy": figures["accuracy"],
        "accuracy_clients": {},
        "accuracy_worst_client": None,
        "curve": curve,
    }
