"""Seeded choices that keep the classes' proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_client.data.errors import PartitionError
from protocol.seeds import derive_seed

Indices = NDArray[np.int64]


def stratified_share(labels: Indices, share: float, seed: int) -> Indices:
    """Sorted positions of about share of each class; labels: int64 (n,), share in (0, 1).

    A class of two or more gives at least one and keeps at least one; a class of one gives none.
    Raises PartitionError.
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
    """Sorted positions of count images, each class with its share (largest remainders).

    Raises PartitionError unless 1 <= count <= n.
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
    """Sorted positions of count images of every class; labels: int64 (n,).

    Raises PartitionError unless 1 <= count, and where a class has fewer images: it names the first
    such class.
    """
    if count < 1:
        raise PartitionError("shots", limit="1 and up", value=count)
    rng = generator(seed, "shots")
    chosen: list[Indices] = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise PartitionError(
                f"training images of class {name}",
                limit=f"at least {count}",
                value=len(members),
                hint="Take fewer shots.",
            )
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def generator(seed: int, purpose: str, *more: int) -> np.random.Generator:
    """A generator of its own for one purpose, so that no two uses of a seed share their numbers.

    more: what else sets this use apart, such as an epoch or an index.
    """
    return np.random.default_rng(derive_seed(seed, purpose, *more))
