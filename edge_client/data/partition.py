"""Cutting one training set into the participants' parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from edge_client.data.errors import PartitionError
from edge_client.data.image_set import ImageSet
from edge_client.data.sampling import Indices, generator

SchemeKind = Literal["iid", "dirichlet", "shards", "quantity", "natural"]

SCHEMES = "iid | dirichlet:ALPHA | shards:PER_PART | quantity:ALPHA | natural"

_PLAIN = ("iid", "natural")

_ALPHA_RANGE = (0.001, 1_000_000.0)

_MOST_SHARDS = 10_000


@dataclass(frozen=True)
class Scheme:
    """How a set is parted.

    iid: equal parts of a shuffled set; dirichlet: each class spread over the parts by a draw from
    Dirichlet(value); shards: the set sorted by class, cut in equal shards, value of them to each
    part; quantity: shuffled, part sizes by a draw from Dirichlet(value); natural: whole groups,
    such as all images of one writer, dealt so that the parts are of about one size. A smaller
    alpha is more uneven.
    """

    kind: SchemeKind
    value: float = 0.0  # alpha, or shards per part; unused by the others

    def __post_init__(self) -> None:
        low, high = _ALPHA_RANGE
        if self.kind in ("dirichlet", "quantity") and not low <= self.value <= high:
            raise PartitionError(f"{self.kind} alpha", limit=f"{low} to {high}", value=self.value)
        if self.kind == "shards" and not (
            self.value == int(self.value) and 1 <= self.value <= _MOST_SHARDS
        ):
            raise PartitionError(
                "shards per part", limit=f"a whole number, 1 to {_MOST_SHARDS}", value=self.value
            )

    def __str__(self) -> str:
        """The text that parses to this scheme."""
        return self.kind if self.kind in _PLAIN else f"{self.kind}:{self.value:g}"


def parse_scheme(text: str) -> Scheme:
    """Read `iid`, `dirichlet:0.3`, `shards:2`, `quantity:0.5`, `natural`. Raises PartitionError."""
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
    """Part number of count, counted from 1: `1/4` is the first of four."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise PartitionError("part", limit="K/N with 1 <= K <= N", value=str(self))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `K/N`. Raises PartitionError."""
        number, _, count = text.strip().partition("/")
        if not (_is_count(number) and _is_count(count)):
            raise PartitionError("part", limit="K/N with 1 <= K <= N", value=text)
        return cls(int(number), int(count))

    def take(self, images: ImageSet, scheme: str | Scheme, seed: int) -> ImageSet:
        """This part of a set. Raises PartitionError, DataFormatError."""
        way = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        groups = images.store.groups() if way.kind == "natural" else None
        cut = partition(images.labels.numpy(), self.count, way, seed, groups)
        return images.subset(cut[self.number - 1])


def partition(
    labels: ArrayLike,
    parts: int,
    scheme: str | Scheme,
    seed: int,
    groups: Sequence[str] | None = None,
) -> list[Indices]:
    """Cut n labelled samples into parts, the same way for the same seed.

    labels: integers (n,); groups: the natural group of each, for the scheme of that name. Gives one
    sorted int64 array of positions for each part; every position is in exactly one of them and no
    part is empty. Raises PartitionError if the scheme cannot be read, if there are more parts than
    samples (or groups), or if groups are asked for and not given.
    """
    known = np.asarray(labels, dtype=np.int64)
    if known.ndim != 1:
        raise PartitionError("labels", limit="one dimension", value=known.shape)
    if not 1 <= parts <= len(known):
        raise PartitionError("parts", limit=f"1 to {len(known)}, one sample each", value=parts)
    way = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    rng = generator(seed, f"partition {way}")
    if way.kind == "iid":
        cut = np.array_split(rng.permutation(len(known)), parts)
    elif way.kind == "quantity":
        cut = _cut_unevenly(rng.permutation(len(known)), parts, way.value, rng)
    elif way.kind == "dirichlet":
        cut = _by_dirichlet(known, parts, way.value, rng)
    elif way.kind == "shards":
        cut = _by_shards(known, parts, int(way.value), rng)
    else:
        cut = _by_group(groups, len(known), parts, rng)
    return [np.sort(part) for part in _without_empty(cut, rng)]


def _by_dirichlet(
    labels: Indices, parts: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    by_class = [
        _cut_unevenly(rng.permutation(np.flatnonzero(labels == label)), parts, alpha, rng)
        for label in np.unique(labels)
    ]
    return [np.concatenate(pieces) for pieces in zip(*by_class, strict=True)]


def _by_shards(
    labels: Indices, parts: int, per_part: int, rng: np.random.Generator
) -> list[Indices]:
    mixed = rng.permutation(len(labels))
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    shards = np.array_split(by_class, parts * per_part)
    dealt = rng.permutation(parts * per_part).reshape(parts, per_part)
    return [np.concatenate([shards[i] for i in hand]) for hand in dealt]


def _by_group(
    groups: Sequence[str] | None, count: int, parts: int, rng: np.random.Generator
) -> list[Indices]:
    """The largest group first, each to the part that has the fewest samples so far."""
    if groups is None or len(groups) != count:
        raise PartitionError(
            "groups", limit=f"{count}, one a sample", value=None if groups is None else len(groups)
        )
    names = {name: place for place, name in enumerate(sorted(set(groups)))}
    of = np.array([names[group] for group in groups])  # (n,)
    if parts > len(names):
        raise PartitionError("parts", limit=f"1 to {len(names)}, one group each", value=parts)
    sizes = np.bincount(of)
    mixed = rng.permutation(len(names))  # so that the seed decides among groups of one size
    hands: list[list[int]] = [[] for _ in range(parts)]
    held = [0] * parts
    for group in mixed[np.argsort(-sizes[mixed], kind="stable")].tolist():
        least = min(range(parts), key=held.__getitem__)
        hands[least].append(group)
        held[least] += int(sizes[group])
    order = rng.permutation(parts)  # or the first part would always have the largest group
    return [np.flatnonzero(np.isin(of, hands[place])) for place in order]


def _cut_unevenly(
    members: Indices, parts: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    shares = rng.dirichlet(np.full(parts, alpha))
    edges = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
    return np.split(members, edges)


def _without_empty(cut: list[Indices], rng: np.random.Generator) -> list[Indices]:
    """Move one sample from the largest part to each empty one. Needs as many samples as parts."""
    filled = list(cut)
    for place, part in enumerate(filled):
        if len(part):
            continue
        largest = max(range(len(filled)), key=lambda i: len(filled[i]))
        given = int(rng.integers(len(filled[largest])))
        filled[place] = filled[largest][given : given + 1]
        filled[largest] = np.delete(filled[largest], given)
    return filled


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
