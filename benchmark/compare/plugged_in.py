"""What was tuned on a proxy, measured in the whole backbone, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmark.compare.tasks import Figures
from edge_client.data import BatchReader, Dataset, ImageSet, load_dataset
from edge_client.device_model import preprocessing_of
from protocol.seeds import derive_seed
from protocol.settings import RunSettings
from split_model import (
    SplitSettings,
    TunedModel,
    image_preparation,
    open_backbone,
    prepare_backbone,
)
from split_model.proxy import plugged
from split_model.tensor_file import write_tensors
from split_server.proxies import IMAGES

_BATCH = 100


def give_images(settings: RunSettings, data_dir: Path) -> None:
    """Put the images that a run distils on into the folder of its server, before it starts.

    Raises:
        DataError: there is no data set of that name.
    """
    how = settings.distillation
    if how.epochs == 0 or how.images == "random":
        return
    held = load_dataset(how.images, seed=0).train
    generator = torch.Generator().manual_seed(derive_seed(0, "distillation-images"))
    chosen = torch.randperm(len(held), generator=generator)[: how.samples]
    pixels = torch.stack([held.image(int(one)) for one in chosen])  # [N, 3, H, W]
    write_tensors(data_dir / IMAGES / f"{how.images}.safetensors", {"images": pixels})


def plugged_in_accuracy(
    settings: RunSettings, state: Mapping[str, Tensor], data: Dataset, cache_dir: Path
) -> float:
    """A share of 1: of the held-out images, by the backbone with a run's final state.

    Args:
        settings: of the run, which was on a proxy.
        state: its last global state.
        data: all devices' images together.
        cache_dir: where the run's server has its backbones.
    """
    split, whole = plugged(SplitSettings.of(settings.model), state)
    backbone = prepare_backbone(split, settings.model.weights, cache_dir)
    model = TunedModel(split, open_backbone(backbone.path), whole)
    return _accuracy(model, data.test)


@torch.no_grad()
def _accuracy(model: TunedModel, held_out: ImageSet) -> float:
    way = preprocessing_of(model.settings, image_preparation(model.settings))
    images, correct = BatchReader(held_out, way, cache_bytes=0), 0
    for positions in torch.arange(len(images)).split(_BATCH):
        pixels, labels = images.read(positions)
        correct += int((model(pixels).argmax(dim=1) == labels).sum())
    return correct / len(images)


def of_backbone(figures: Figures, accuracy: float) -> Figures:
    """The figures of a run on a proxy, with the backbone's accuracy for the proxy's.

    Devices measure the proxy in every round, the backbone is measured once, at the end: the curve
    has its one point there. What devices measured last stands beside it.
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
