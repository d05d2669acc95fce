"""A data set of two image sets, for training and for testing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_client.data.errors import ClassMismatchError, EmptyDatasetError, PartitionError
from edge_client.data.image_set import ImageSet
from edge_client.data.remarks import Remark, compose, summarise
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
                hint=f"Skipped: {summarise(self.skipped)}" if self.skipped else "",
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names, in the order of their labels."""
        return self.train.class_names

    @property
    def skipped(self) -> tuple[Remark, ...]:
        """The skipped files and classes of both sets, without repeats."""
        return tuple(dict.fromkeys(self.train.skipped + self.test.skipped))

    @property
    def noticed(self) -> tuple[Remark, ...]:
        """The remarks on loaded files and classes of both sets, without repeats."""
        return tuple(dict.fromkeys(self.train.noticed + self.test.noticed))

    def drop_resized(self) -> None:
        """Free the resized images that no `BatchReader` has taken."""
        self.train.store.drop_resized()
        self.test.store.drop_resized()

    def readable(self) -> Dataset:
        """Return the data without images that have become unreadable.

        Raises:
            EmptyDatasetError: no training image is left.
        """
        return Dataset(self.train.readable(), self.test.readable())

    def aligned(self, class_names: Sequence[str]) -> Dataset:
        """Return both sets with labels that index ``class_names``.

        A class may have test images without training images.

        Raises:
            ClassMismatchError: the training set shares no class with ``class_names``.
            EmptyDatasetError: no training image is left.
        """
        train = self.train.aligned(class_names)
        counts = train.class_counts().tolist()
        absent = [name for name, count in zip(train.class_names, counts, strict=True) if not count]
        if absent:
            reason = "no training images of these classes of the run"
            noticed = Remark(", ".join(absent), reason)
            train = replace(train, noticed=(*train.noticed, noticed))
        return Dataset(train, self.test.aligned(class_names))


def hold_out(images: ImageSet, share: float, seed: int) -> Dataset:
    """Split off a share of each class for testing, by seed.

    A class of two or more images gets at least one in each set. If a class has one image, it is for
    training.

    Args:
        images: the whole set.
        share: share of each class to hold out, in (0, 1).
        seed: seed of the choice.

    Raises:
        PartitionError: ``share`` is out of range.
        EmptyDatasetError: there are no images.
    """
    test = stratified_share(images.labels, share, seed)
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
    """Limit the number of images of each set, in the proportions of its classes.

    The same data and seed give the same images on every device.

    Args:
        dataset: the training and the test set.
        train: number of training images, at most; None: no limit.
        test: number of test images, at most; None: no limit.
        shots: exact number of training images of each class, instead of ``train``.
        seed: seed of the choice.

    Raises:
        PartitionError: a limit is not positive, both ``train`` and ``shots`` are given, or a class
            has fewer training images than ``shots``.
    """
    chosen = dataset.train
    if shots is None:
        chosen = _limit(chosen, "train", train, seed)
    elif train is None:
        positions = pick_per_class(chosen.labels, chosen.class_names, shots, seed)
        chosen = chosen.subset(positions)
    else:
        raise PartitionError(
            "training images", limit="shots or a total number", value=f"{shots} and {train}"
        )
    return Dataset(chosen, _limit(dataset.test, "test", test, seed))


def _limit(images: ImageSet, field: str, limit: int | None, seed: int) -> ImageSet:
    if limit is None or (limit >= len(images) and limit > 0):
        return images
    return images.subset(stratified_pick(images.labels, limit, seed, field=field))


def by_content(dataset: Dataset) -> Dataset:
    """Order both sets by a hash of each image.

    Class folders are read class by class, and the server sees the order of the samples. It could
    infer which samples share a label. The order by hash is independent of the labels, and equal
    images give an equal order, so that runs with the same seed are equal.
    """
    return Dataset(_order(dataset.train), _order(dataset.test))


def _order(images: ImageSet) -> ImageSet:
    digests = [images.store.digest(position) for position in range(len(images))]
    order = sorted(range(len(images)), key=lambda position: (digests[position], position))
    return images.subset(order)


def hash_names(class_names: Sequence[str]) -> str:
    """Return the SHA-256 over the names in order, in NFC, each followed by a newline."""
    text = "".join(f"{compose(name)}\n" for name in class_names)
    return hashlib.sha256(text.encode()).hexdigest()
