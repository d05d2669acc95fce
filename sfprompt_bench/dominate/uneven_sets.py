"""Uneven sets, written as folders of pictures: one class of most images, or one of five."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from edge_client.data.dataset import limit_per_set
from edge_client.data.image_set import ImageSet
from edge_client.data.sampling import Indices, generator
from edge_client.data.sources import load_dataset
from sfprompt_bench.dominate.cells import Cell

CLASS_NAMES = tuple(f"class-{number}" for number in range(10))  # names of folders

_MAJORITY_SHARE = 0.75

_RARE_IMAGES = 5


def set_folder(folder: Path, cell: Cell, seed: int) -> Path:
    """The folder of a cell's images for one seed, below that of all results."""
    return folder / "sets" / f"{cell.name}-{seed}"


def write_set(folder: Path, cell: Cell, seed: int, test_images: int) -> Path:
    """Write a cell's training and test images, unless an earlier call has.

    The seed determines the images and which class is the large or the small one. Test images have
    the proportions of the whole data set.
    """
    place = set_folder(folder, cell, seed)
    if place.exists():
        return place
    whole = load_dataset(cell.data, seed=seed)
    limit = min(test_images, len(whole.test))
    test = limit_per_set(whole, test=limit, seed=seed).test
    partial = place.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    _write(whole.train.subset(_pick(whole.train, cell, seed)), partial / "train")
    _write(test, partial / "test")
    partial.rename(place)
    return place


def class_sizes(cell: Cell, special: int) -> list[int]:
    """Images of each class; ``special`` is the class with most, or with five."""
    classes = len(CLASS_NAMES)
    first = _RARE_IMAGES if cell.kind == "rare" else round(_MAJORITY_SHARE * cell.images)
    share, more = divmod(cell.images - first, classes - 1)
    others = iter(share + (number < more) for number in range(classes - 1))
    return [first if number == special else next(others) for number in range(classes)]


def _pick(images: ImageSet, cell: Cell, seed: int) -> Indices:
    rng = generator(seed, f"uneven set {cell.kind}")
    sizes = class_sizes(cell, int(rng.integers(len(CLASS_NAMES))))
    labels = images.labels
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:size] for label, size in enumerate(sizes)
    ]
    return np.sort(np.concatenate(chosen))


def _write(images: ImageSet, folder: Path) -> None:
    for number in range(len(images)):
        place = folder / CLASS_NAMES[images.label(number)]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.ascontiguousarray(images.image(number).transpose(1, 2, 0))
        Image.fromarray(pixels).save(place / f"{number:05}.png")
