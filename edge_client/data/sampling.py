"""Seeded choices of samples that preserve the classes' proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_client.data.errors import PartitionError
from protocol.seeds import derive_seed

Indices = NDArray[np.int64]


def stratified_share(labels: Indices, share: float, seed: int) -> Indices:
    """Choose a share of each class, rounded, but at least one sample and not all.

    No sample is chosen from a class with one sample.

    Args:
        labels: class of each sample, int64 [n].
        share: share of each class, in (0, 1).
        seed: seed of the choice.

    Returns:
        Sorted positions of the chosen samples, int64 [m].

    Raises:
        PartitionError: ``share`` is out of range.
    """
    if not 0.0 < share < 1.0:
        raise PartitionError("held-out share", limit="more than 0, less than 1", value=share)
    rng = generator(seed, "held-out")
    chosen: list[Indices] = [np.empty(0, np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def stratified_pick(labels: Indices, count: int, seed: int, *, field: str = "count") -> Indices:
    """Choose ``count`` samples in the classes' proportions (largest-remainder method).

    Args:
        labels: class of each sample, int64 [n].
        count: number of samples, 1 to n.
        seed: seed of the choice.
        field: name of ``count`` in an error.

    Returns:
        Sorted positions of the chosen samples, int64 [count].

    Raises:
        PartitionError: ``count`` is out of range.
    """
    total = len(labels)
    if not 1 <= count <= total:
        raise PartitionError(field, limit=f"1 to {total}", value=count)
    rng = generator(seed, "limit")
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / total)
    quota = np.floor(exact).astype(np.int64)
    largest = np.argsort(quota - exact, kind="stable")[: count - int(quota.sum())]
    quota[largest] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:size]
        for label, size in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def pick_per_class(labels: Indices, class_names: Sequence[str], count: int, seed: int) -> Indices:
    """Choose ``count`` samples of each class.

    Args:
        labels: class of each sample, int64 [n].
        class_names: names of the C classes, in the order of the labels.
        count: number of samples of each class, at least 1.
        seed: seed of the choice.

    Returns:
        Sorted positions of the chosen samples, int64 [C * count].

    Raises:
        PartitionError: ``count`` is below 1, or a class has fewer samples.
    """
    if count < 1:
        raise PartitionError("shots", limit="at least 1", value=count)
    rng = generator(seed, "shots")
    chosen: list[Indices] = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise PartitionError(
                f"training images of class {name}",
                limit=f"at least {count}",
                value=len(members),
                hint="Use fewer shots.",
            )
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def generator(seed: int, purpose: str, *more: int) -> np.random.Generator:
    """Return a random generator for one use of a seed, independent of its other uses.

    Args:
        seed: seed of the run or of the data.
        purpose: name of the use.
        more: further numbers that identify the use, such as an epoch or an index.
    """
    return np.random.default_rng(derive_seed(seed, purpose, *more))
