"""What a loader gives: images to train on, images to test on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edge_client.data.errors import (
    ClassMismatchError,
    CorruptImageError,
    EmptyDatasetError,
    PartitionError,
)
from edge_client.data.image_set import ImageSet, Skipped
from edge_client.data.sampling import pick_per_class, stratified_pick, stratified_share


@dataclass(frozen=True)
class Dataset:
    """Two image sets over the same classes."""

    train: ImageSet
    test: ImageSet

    def __post_init__(self) -> None:
        if self.train.class_names != self.test.class_names:
            raise ClassMismatchError(
                "class names of test",
                limit=", ".join(self.train.class_names),
                value=", ".join(self.test.class_names),
            )
        if len(self.train) == 0:
            raise EmptyDatasetError(
                "training set",
                limit="at least one readable image",
                value=0,
                hint=_named(self.train.skipped),
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of their labels."""
        return self.train.class_names

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was left out of either set, each named once."""
        return tuple(dict.fromkeys(self.train.skipped + self.test.skipped))

    def readable(self) -> Dataset:
        """Without the images that cannot be read any more. Raises EmptyDatasetError."""
        return Dataset(self.train.readable(), self.test.readable())

    def aligned(self, class_names: Sequence[str]) -> Dataset:
        """Both sets with labels that index class_names. Raises ClassMismatchError,
        EmptyDatasetError."""
        return Dataset(self.train.aligned(class_names), self.test.aligned(class_names))


def hold_out(images: ImageSet, share: float, seed: int) -> Dataset:
    """Set aside a share of each class for testing, the same one for the same seed.

    share lies in (0, 1). A class of two or more images has at least one on either side; a class
    of one is trained on. Raises PartitionError, EmptyDatasetError.
    """
    test = stratified_share(images.labels.numpy(), share, seed)
    train = np.setdiff1d(np.arange(len(images)), test)
    return Dataset(images.subset(train), images.subset(test))


def limit_per_set(
    dataset: Dataset,
    *,
    train: int | None = None,
    test: int | None = None,
    shots: int | None = None,
    seed: int,
) -> Dataset:
    """At most so many images of each set, in the classes' own proportions. None: all of them.

    shots, in place of train: just so many training images of every class, drawn with a seed of
    their own. All who have the same data and seed draw the same images.
    Raises PartitionError if a limit is not positive, if both train and shots are given, or if a
    class has fewer training images than shots.
    """
    chosen = dataset.train
    if shots is None:
        chosen = _limited(chosen, "train", train, seed)
    elif train is None:
        few = pick_per_class(chosen.labels.numpy(), chosen.class_names, shots, seed)
        chosen = chosen.subset(few)
    else:
        raise PartitionError(
            "training images", limit="shots or a number in all", value=f"{shots} and {train}"
        )
    return Dataset(chosen, _limited(dataset.test, "test", test, seed))


def _limited(images: ImageSet, field: str, limit: int | None, seed: int) -> ImageSet:
    if limit is None or (limit >= len(images) and limit > 0):
        return images
    return images.subset(stratified_pick(images.labels.numpy(), limit, seed, field=field))


def _named(skipped: tuple[Skipped, ...], most: int = 5) -> str:
    if not skipped:
        return ""
    named = "; ".join(f"{entry.path} ({entry.reason})" for entry in skipped[:most])
    more = f"; and {len(skipped) - most} more" if len(skipped) > most else ""
    return f"Skipped: {named}{more}"


def by_content(dataset: Dataset) -> Dataset:
    """Both sets in the order of a hash of each image.

    Class folders are read class by class, and a server sees in which order samples are sent: from
    neighbours it could tell which have one label. This order is the same for the same images, so
    that a seed still fixes a run, and means nothing to whoever does not have them.
    """
    return Dataset(_ordered(dataset.train), _ordered(dataset.test))


def _ordered(images: ImageSet) -> ImageSet:
    digests = [_digest(images, position) for position in range(len(images))]
    order = sorted(range(len(images)), key=lambda position: (digests[position], position))
    return images.subset(torch.tensor(order, dtype=torch.int64))


def _digest(images: ImageSet, position: int) -> bytes:
    try:
        image = images.image(position)  # uint8 [3, H, W]
    except CorruptImageError:
        return b""  # whoever reads it later says so
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()
