"""Partition a set of images into one part for each participant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from edge_client.data.errors import PartitionError
from edge_client.data.sampling import Indices, generator

if TYPE_CHECKING:  # a scheme is also parsed without images
    from edge_client.data.image_set import ImageSet

SchemeKind = Literal["iid", "dirichlet", "shards", "quantity", "natural"]

SCHEMES = "iid | dirichlet:ALPHA | shards:PER_PART | quantity:ALPHA | natural"

_PLAIN = ("iid", "natural")

_ALPHA_RANGE = (0.001, 1_000_000.0)

_MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Scheme:
    """A partition scheme.

    - iid: equal parts of the shuffled set
    - dirichlet: each class is distributed over the parts by a draw from Dirichlet(value)
    - shards: the set is sorted by class and cut into equal shards; each part gets ``value`` of them
    - quantity: shuffled; the parts' sizes are a draw from Dirichlet(value)
    - natural: whole groups, such as all images of one writer, in parts of similar size

    Attributes:
        value: alpha (smaller: more uneven), or shards per part; unused by iid and natural.

    Raises:
        PartitionError: ``value`` is out of range.
    """

    kind: SchemeKind
    value: float = 0.0

    def __post_init__(self) -> None:
        low, high = _ALPHA_RANGE
        if self.kind in ("dirichlet", "quantity") and not low <= self.value <= high:
            raise PartitionError(f"{self.kind} alpha", limit=f"{low} to {high}", value=self.value)
        if self.kind == "shards" and not (
            self.value == int(self.value) and 1 <= self.value <= _MAX_SHARDS
        ):
            raise PartitionError(
                "shards per part", limit=f"a whole number, 1 to {_MAX_SHARDS}", value=self.value
            )

    def __str__(self) -> str:
        """Return the text that `parse_scheme` parses to this scheme."""
        return self.kind if self.kind in _PLAIN else f"{self.kind}:{self.value:g}"


def parse_scheme(text: str) -> Scheme:
    """Parse ``iid``, ``dirichlet:0.3``, ``shards:2``, ``quantity:0.5`` or ``natural``.

    Raises:
        PartitionError: the text has another form, or its value is out of range.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind == "iid" and not colon:
        return Scheme("iid")
    if kind == "natural" and not colon:
        return Scheme("natural")
    try:
        value = float(rest)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        if kind == "dirichlet":
            return Scheme("dirichlet", value)
        if kind == "shards":
            return Scheme("shards", value)
        if kind == "quantity":
            return Scheme("quantity", value)
    raise PartitionError("partition", limit=SCHEMES, value=text)


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, from 1: ``1/4`` is the first of four."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise PartitionError("part", limit="K/N with 1 <= K <= N", value=str(self))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse ``K/N``.

        Raises:
            PartitionError: the text has another form, or K is out of range.
        """
        number, _, count = text.strip().partition("/")
        if not (_is_count(number) and _is_count(count)):
            raise PartitionError("part", limit="K/N with 1 <= K <= N", value=text)
        return cls(int(number), int(count))

    def take(self, images: ImageSet, scheme: str | Scheme, seed: int) -> ImageSet:
        """Return this part of a set.

        Raises:
            PartitionError: the set cannot be partitioned by this scheme.
            DataFormatError: the file with the images' groups is faulty.
        """
        scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        groups = images.store.groups() if scheme.kind == "natural" else None
        parts = partition(images.labels, self.count, scheme, seed, groups)
        return images.subset(parts[self.number - 1])


def partition(
    labels: ArrayLike,
    parts: int,
    scheme: str | Scheme,
    seed: int,
    groups: Sequence[str] | None = None,
) -> list[Indices]:
    """Partition n labelled samples; the same seed gives the same parts.

    Args:
        labels: integers [n].
        parts: number of parts.
        scheme: the scheme, or its text.
        seed: seed of the draws.
        groups: group of each sample, for the scheme natural; None: unknown.

    Returns:
        A sorted int64 array of positions for each part. Every position is in exactly one part, and
        no part is empty.

    Raises:
        PartitionError: the scheme's text is invalid, there are fewer samples (or groups) than
            parts, or the scheme needs groups and they are missing.
    """
    known = np.asarray(labels, dtype=np.int64)
    if known.ndim != 1:
        raise PartitionError("labels", limit="one dimension", value=known.shape)
    if not 1 <= parts <= len(known):
        raise PartitionError("parts", limit=f"1 to {len(known)}, one sample each", value=parts)
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    rng = generator(seed, f"partition {scheme}")
    if scheme.kind == "iid":
        members = np.array_split(rng.permutation(len(known)), parts)
    elif scheme.kind == "quantity":
        members = _split_unevenly(rng.permutation(len(known)), parts, scheme.value, rng)
    elif scheme.kind == "dirichlet":
        members = _split_by_dirichlet(known, parts, scheme.value, rng)
    elif scheme.kind == "shards":
        members = _split_by_shards(known, parts, int(scheme.value), rng)
    else:
        members = _split_by_group(groups, len(known), parts, rng)
    return [np.sort(part) for part in _fill_empty(members, rng)]


def _split_by_dirichlet(
    labels: Indices, parts: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    by_class = [
        _split_unevenly(rng.permutation(np.flatnonzero(labels == label)), parts, alpha, rng)
        for label in np.unique(labels)
    ]
    return [np.concatenate(pieces) for pieces in zip(*by_class, strict=True)]


def _split_by_shards(
    labels: Indices, parts: int, per_part: int, rng: np.random.Generator
) -> list[Indices]:
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(by_class, parts * per_part)
    assigned = rng.permutation(parts * per_part).reshape(parts, per_part)
    return [np.concatenate([shards[i] for i in numbers]) for numbers in assigned]


def _split_by_group(
    groups: Sequence[str] | None, count: int, parts: int, rng: np.random.Generator
) -> list[Indices]:
    """Assign the groups, the largest first, each to the part with the fewest samples so far."""
    if groups is None or len(groups) != count:
        raise PartitionError(
            "groups",
            limit=f"{count}, one for each sample",
            value=None if groups is None else len(groups),
        )
    numbers = {name: number for number, name in enumerate(sorted(set(groups)))}
    group_of = np.array([numbers[group] for group in groups])  # [n]
    if parts > len(numbers):
        raise PartitionError("parts", limit=f"1 to {len(numbers)}, one group each", value=parts)
    sizes = np.bincount(group_of)
    shuffled = rng.permutation(len(numbers))  # the seed decides between groups of equal size
    assigned: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist():
        smallest = min(range(parts), key=totals.__getitem__)
        assigned[smallest].append(group)
        totals[smallest] += int(sizes[group])
    order = rng.permutation(parts)  # otherwise the first part always has the largest group
    return [np.flatnonzero(np.isin(group_of, assigned[part])) for part in order]


def _split_unevenly(
    members: Indices, parts: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    shares = rng.dirichlet(np.full(parts, alpha))
    edges = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
    return np.split(members, edges)


def _fill_empty(parts: list[Indices], rng: np.random.Generator) -> list[Indices]:
    """Move one sample from the largest part to each empty part. Needs as many samples as parts."""
    filled = list(parts)
    for number, part in enumerate(filled):
        if len(part):
            continue
        largest = max(range(len(filled)), key=lambda i: len(filled[i]))
        row = int(rng.integers(len(filled[largest])))
        filled[number] = filled[largest][row : row + 1]
        filled[largest] = np.delete(filled[largest], row)
    return filled


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
