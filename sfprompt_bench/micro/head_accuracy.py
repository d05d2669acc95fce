"""What a head file's quantisation costs: bytes, the body's features and a classifier's accuracy.

    python -m sfprompt_bench.micro.head_accuracy

Each head feeds the frozen body without prompts. A ridge classifier is fitted to the features of 600
images and tested on all others, for 20 draws of these 600: to the last class token alone, and to
all that the default form's tail reads. Heads are compared draw by draw.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.batches import BatchReader
from edge_client.data.download import cache_dir
from edge_client.data.sources import load_dataset, parse_source
from edge_client.model import preprocessing_of
from edge_client.torch_model import read
from protocol.plan import ModelPlan
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.head_file import HeadDtype, Unpacked, packed, packed_bytes
from split_model.checkpoints.metadata import image_preparation
from split_model.parts.body import Body
from split_model.parts.build import build_body, build_head, frozen_names
from split_model.parts.head import Head

SETTINGS = ModelPlan(image_size=42, cut=1, prompt_at="cut", prompt_count=0, depths=4)

CLASS_TOKEN = -3  # of the last depth, before mean and spread of the patch tokens

DATA = ("digits", "fashion-mnist")

DTYPES: tuple[HeadDtype, ...] = ("float32", "int8", "int4")

IMAGES, TRAIN_IMAGES, DRAWS = 1500, 600, 20  # the first: of each of the two sets, at most

_REGULARISATION = 1 / 4096  # of standardised features, for each sample and feature

_BATCH = 100


def ridge_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Fit least squares with an L2 penalty to one-hot labels; return the accuracy.

    Args:
        train: features [N, D].
        labels: their classes [N].
        test: features [M, D].
        test_labels: their classes [M].
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    inputs, others = ((x - mean).div(std).double() for x in (train, test))
    targets = F.one_hot(labels).double()
    means = targets.mean(0)
    penalty = _REGULARISATION * inputs.numel() * torch.eye(len(inputs), dtype=torch.float64)
    duals = torch.linalg.solve(inputs @ inputs.T + penalty, targets - means)  # [N, C]
    scores = others @ (inputs.T @ duals) + means
    return float((scores.argmax(1) == test_labels).double().mean())


@torch.no_grad()
def read_tokens(head: Head, body: Body, images: BatchReader) -> Tensor:
    """Compute what a tail reads of a set's first images, [N, R, D]."""
    positions = torch.arange(min(IMAGES, len(images)))
    batches = [read(images, batch.numpy())[0] for batch in positions.split(_BATCH)]
    return torch.cat([body(head(batch)) for batch in batches])


def draw_accuracies(features: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy of each draw, [DRAWS], from features [N, D]."""
    accuracies = []
    for seed in range(DRAWS):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
        accuracies.append(
            ridge_accuracy(features[train], labels[train], features[test], labels[test])
        )
    return torch.tensor(accuracies, dtype=torch.float64)


def main() -> None:
    """Print a row for each data set and type of head file."""
    backbone = prepare_backbone(SETTINGS, SETTINGS.weights, cache_dir() / "backbones")
    weights = open_backbone(backbone.path)
    frozen = {name: weights[name] for name in frozen_names(SETTINGS)}
    body = build_body(SETTINGS, weights)
    preprocessing = preprocessing_of(SETTINGS, image_preparation(SETTINGS))
    for dtype in DTYPES:
        sys.stdout.write(f"{dtype}: {packed_bytes(frozen, dtype):,} bytes\n")
    sys.stdout.write("data, features, head, cosine mean and least, accuracy, points over int8\n")
    for name in DATA:
        data = load_dataset(parse_source(name), held_out=0.3, seed=0)
        readers = [BatchReader(part, preprocessing) for part in (data.train, data.test)]
        both = [part.labels[:IMAGES] for part in (data.train, data.test)]
        labels = torch.from_numpy(np.concatenate(both))
        tokens = {
            dtype: torch.cat([read_tokens(head, body, images) for images in readers])
            for dtype, head in _heads(frozen).items()
        }
        features = {
            "class token": {dtype: read[:, CLASS_TOKEN] for dtype, read in tokens.items()},
            "all": {dtype: read.flatten(1) for dtype, read in tokens.items()},
        }
        for kind, inputs in features.items():
            for line in _compare(inputs, labels):
                sys.stdout.write(f"{name}, {kind}, {line}\n")
        sys.stdout.flush()


def _compare(features: Mapping[HeadDtype, Tensor], labels: Tensor) -> Iterator[str]:
    """Yield a line for each head, from its features [N, D]."""
    accuracies = {dtype: draw_accuracies(features[dtype], labels) for dtype in DTYPES}
    for dtype in DTYPES:
        cosine = F.cosine_similarity(features[dtype], features["float32"], dim=1)
        gain = 100 * (accuracies[dtype] - accuracies["int8"])
        yield (
            f"{dtype}, {cosine.mean():.4f}, {cosine.min():.4f}, {accuracies[dtype].mean():.2%}, "
            f"{gain.mean():+.2f} ± {gain.std() / math.sqrt(DRAWS):.2f}"
        )


def _heads(frozen: Mapping[str, Tensor]) -> dict[HeadDtype, Head]:
    return {dtype: build_head(SETTINGS, Unpacked(packed(frozen, dtype))) for dtype in DTYPES}


if __name__ == "__main__":
    main()
