"""What a head file's quantisation costs: bytes, the body's features and a classifier's accuracy.

    python -m sfprompt_bench.micro.head_accuracy

Each head feeds the frozen body without prompts. A ridge classifier is fitted to the class tokens of
600 training images for each of three draws, and tested on held-out images.
"""

from __future__ import annotations

import sys
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data import BatchReader, Dataset, cache_dir, load_dataset, parse_source
from edge_client.model import preprocessing_of
from protocol.plan import ModelPlan
from split_model import Body, Head, build_body, build_head, image_preparation, open_backbone
from split_model import prepare_backbone as prepare
from split_model.checkpoints.head_file import HeadDtype, Unpacked, packed, packed_bytes
from split_model.parts.build import frozen_names

SETTINGS = ModelPlan(image_size=42, cut=1, prompt_at="cut", prompt_count=0)

DATA = ("digits", "fashion-mnist")

SEEDS, TRAIN_IMAGES, TEST_IMAGES = (0, 1, 2), 600, 1500

_REGULARISATION = 0.1  # of standardised features, per sample

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
    penalty = _REGULARISATION * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    means = targets.mean(0)
    weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (targets - means))
    return float(((others @ weights + means).argmax(1) == test_labels).double().mean())


@torch.no_grad()
def class_tokens(head: Head, body: Body, images: BatchReader, positions: Tensor) -> Tensor:
    """Compute the body's class tokens [N, D] of the images at ``positions`` [N]."""
    batches = [images.read(batch)[0] for batch in positions.split(_BATCH)]
    return torch.cat([body(head(batch), None, 1)[:, 0] for batch in batches])


def main() -> None:
    """Print a row for each data set and type of head file."""
    backbone = prepare(SETTINGS, SETTINGS.weights, cache_dir() / "backbones")
    weights = open_backbone(backbone.path)
    frozen = {name: weights[name] for name in frozen_names(SETTINGS)}
    body = build_body(SETTINGS, weights)
    dtypes: tuple[HeadDtype, ...] = get_args(HeadDtype)
    heads = {d: build_head(SETTINGS, Unpacked(packed(frozen, d))) for d in dtypes}
    sys.stdout.write("data, head, bytes, cosine mean, cosine least, accuracy of each draw\n")
    for name in DATA:
        data = load_dataset(parse_source(name), held_out=0.3, seed=0)
        _measure(name, data, heads, body, {d: packed_bytes(frozen, d) for d in dtypes})


def _measure(
    name: str, data: Dataset, heads: dict[HeadDtype, Head], body: Body, nbytes: dict[HeadDtype, int]
) -> None:
    preprocessing = preprocessing_of(SETTINGS, image_preparation(SETTINGS))
    train, test = (BatchReader(part, preprocessing) for part in (data.train, data.test))
    test_positions = torch.arange(min(TEST_IMAGES, len(test)))
    test_labels = data.test.labels[test_positions]
    draws = [
        torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:TRAIN_IMAGES]
        for seed in SEEDS
    ]
    exact = class_tokens(heads["float32"], body, test, test_positions)
    for dtype, head in heads.items():
        tokens = class_tokens(head, body, test, test_positions)
        cosine = F.cosine_similarity(tokens, exact, dim=1)
        accuracies = [
            ridge_accuracy(
                class_tokens(head, body, train, draw), data.train.labels[draw], tokens, test_labels
            )
            for draw in draws
        ]
        shown = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        mean = sum(accuracies) / len(accuracies)
        sys.stdout.write(
            f"{name}, {dtype}, {nbytes[dtype]:,}, {cosine.mean():.4f}, {cosine.min():.4f}, "
            f"{shown}, mean {mean:.1%}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
