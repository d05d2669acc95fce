"""Random settings of a run, and its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ArrayStore, ImageSet
from edge_client.data.partition import partition
from edge_client.data.sampling import Indices, generator
from edge_client.data.sources import load_dataset

Source = Literal["synthetic", "digits", "fashion-mnist"]

SOURCES: tuple[Source, ...] = ("synthetic", "digits", "fashion-mnist")

_PATCH = 14  # pixels of the backbone's patches

_PATTERN, _DRAWN = 8, 32  # pixels of a class's pattern, and of a synthetic image

_TOKENS = 5_000  # of all images of a run: what a core computes in some ten seconds

_TEST_IMAGES = 120

_MOST_CLASSES = 10  # of the data sets with real images

_LEAST_PER_DEVICE = 5


@dataclass(frozen=True)
class Draw:
    """The settings of one run.

    Attributes:
        number: of the draw; it determines everything.
        source: of the images.
        classes: of the run.
        devices: their number.
        images: of training, over all devices, at most.
        test_images: likewise.
        partition: of the training images.
        image_size: in pixels, after resizing.
        noise: of synthetic images, as a share of their patterns' deviation.
        wrong_labels: share of the training labels that are replaced at random.
        rounds: of the run.
    """

    number: int
    source: Source
    classes: int
    devices: int
    images: int
    test_images: int
    partition: str
    image_size: int
    noise: float
    wrong_labels: float
    rounds: int


def draw(number: int, *, patch: int = _PATCH, tokens: int = _TOKENS) -> Draw:
    """Draw the settings of a run.

    Args:
        number: of the run; it determines the settings.
        patch: pixels of the backbone's patches.
        tokens: of all images; large images are fewer.
    """
    rng = generator(number, "random settings")
    source = SOURCES[int(rng.integers(len(SOURCES)))]
    most = 20 if source == "synthetic" else _MOST_CLASSES
    classes, devices = int(rng.integers(2, most + 1)), int(rng.integers(1, 9))
    size = patch * int(rng.integers(2, 9))
    possible = tokens // ((size // patch) ** 2 + 1)
    test = min(_TEST_IMAGES, possible // 3)
    per_device = round(float(np.exp(rng.uniform(np.log(_LEAST_PER_DEVICE), np.log(500)))))
    images = min(devices * per_device, possible - test)
    schemes = ("iid", f"dirichlet:{rng.choice([0.1, 0.3, 1.0])}", "shards:1", "quantity:0.5")
    return Draw(
        number=number,
        source=source,
        classes=classes,
        devices=devices,
        images=max(images, devices),
        test_images=test,
        partition=str(rng.choice(schemes)),
        image_size=size,
        noise=float(np.exp(rng.uniform(np.log(0.3), np.log(6)))),
        wrong_labels=float(rng.choice([0.0, 0.0, 0.0, 0.1, 0.3])),
        rounds=int(rng.integers(2, 9)),
    )


def data_of(drawn: Draw) -> list[Dataset]:
    """Make each device's images; the first device has all test images."""
    whole = _synthetic(drawn) if drawn.source == "synthetic" else _real(drawn)
    train = _with_wrong_labels(whole.train, drawn)
    parts = partition(train.labels, drawn.devices, drawn.partition, drawn.number)
    nothing = whole.test.subset(())
    return [
        Dataset(train.subset(part), nothing if place else whole.test)
        for place, part in enumerate(parts)
    ]


def _real(drawn: Draw) -> Dataset:
    """The first classes of a data set, named as the classes of the run."""
    whole = load_dataset(drawn.source, seed=drawn.number)
    names = whole.class_names[: drawn.classes]
    rng = generator(drawn.number, "random images")
    sets = []
    for images, count in ((whole.train, drawn.images), (whole.test, drawn.test_images)):
        labels = images.labels
        known = rng.permutation(np.flatnonzero(labels < drawn.classes))[:count]
        chosen = images.subset(known)
        sets.append(ImageSet(chosen.store, chosen.labels, names))
    return Dataset(*sets)


def _synthetic(drawn: Draw) -> Dataset:
    """A smooth coloured pattern for each class, and noise over it."""
    rng = generator(drawn.number, "random images")
    patterns = torch.from_numpy(rng.normal(size=(drawn.classes, 3, _PATTERN, _PATTERN)))
    smooth = F.interpolate(patterns, (_DRAWN, _DRAWN), mode="bilinear", align_corners=False)
    names = tuple(f"class-{label}" for label in range(drawn.classes))

    def images(count: int) -> ImageSet:
        labels = rng.integers(drawn.classes, size=count)
        noise = drawn.noise * rng.normal(size=(count, 3, _DRAWN, _DRAWN))
        pixels = 128 + 40 * (smooth[labels] + torch.from_numpy(noise))
        store = ArrayStore(pixels.round().clamp(0, 255).to(torch.uint8).numpy())
        return ImageSet(store, labels, names)

    return Dataset(images(drawn.images), images(drawn.test_images))


def _with_wrong_labels(images: ImageSet, drawn: Draw) -> ImageSet:
    rng = generator(drawn.number, "wrong labels")
    labels: Indices = images.labels.copy()
    wrong = rng.random(len(labels)) < drawn.wrong_labels
    labels[wrong] = rng.integers(drawn.classes, size=int(wrong.sum()))
    return ImageSet(images.store, labels, images.class_names)
