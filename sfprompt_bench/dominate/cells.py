"""The cells of ``sfprompt-bench dominate``: a data set, a number of images and a partition each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from protocol.errors import NotFound

Kind = Literal["iid", "dirichlet", "one-class", "majority", "rare"]

_SIZES = {"digits": (60, 240, 600, 1400), "fashion-mnist": (60, 240, 600, 2400, 6000)}

_UNEVEN_IMAGES = 600

_CLASSES = 10

# Devices and partition of each kind.
_PARTITIONS: dict[Kind, tuple[int, str]] = {
    "iid": (4, "iid"),
    "dirichlet": (4, "dirichlet:0.3"),
    "one-class": (10, "shards:1"),
    "majority": (4, "iid"),
    "rare": (4, "iid"),
}

_WORDS: dict[Kind, str] = {
    "iid": "IID",
    "dirichlet": "Dirichlet 0.3",
    "one-class": "one class a device, 10 devices",
    "majority": "75 % of one class",
    "rare": "one class with 5 images",
}

# Rounds of methods with gradients: few images need more rounds for as many steps.
_RIVAL_ROUNDS = {60: 30, 240: 15}
_MANY_ROUNDS, _FEW_ROUNDS, _FEW_ROUNDS_FROM = 10, 6, 1200


@dataclass(frozen=True)
class Cell:
    """A data set with a number of training images over all devices, and their partition."""

    data: str
    images: int
    kind: Kind = "iid"

    @property
    def name(self) -> str:
        suffix = "" if self.kind == "iid" else f"-{self.kind}"
        return f"{self.data}-{self.images}{suffix}"

    @property
    def words(self) -> str:
        """The cell for people: ``Fashion-MNIST, 600 images, IID``."""
        data = {"digits": "digits", "fashion-mnist": "Fashion-MNIST"}[self.data]
        return f"{data}, {self.images:,} images, {_WORDS[self.kind]}"

    @property
    def devices(self) -> int:
        return _PARTITIONS[self.kind][0]

    @property
    def partition(self) -> str:
        return _PARTITIONS[self.kind][1]

    @property
    def shots(self) -> int | None:
        """Images of each class, where each device has exactly one class."""
        return self.images // _CLASSES if self.kind == "one-class" else None

    @property
    def is_uneven_set(self) -> bool:
        """Whether the classes themselves have different sizes, whatever the partition."""
        return self.kind in ("majority", "rare")

    @property
    def rival_rounds(self) -> int:
        """Rounds of the methods that are trained by gradients."""
        if self.images in _RIVAL_ROUNDS:
            return _RIVAL_ROUNDS[self.images]
        return _MANY_ROUNDS if self.images < _FEW_ROUNDS_FROM else _FEW_ROUNDS


CELLS: tuple[Cell, ...] = (
    *(Cell(data, images) for data, sizes in _SIZES.items() for images in sizes),
    *(Cell(data, _UNEVEN_IMAGES, kind) for data in _SIZES for kind in _PARTITIONS if kind != "iid"),
)

QUICK = (Cell("digits", 60), Cell("fashion-mnist", 60), Cell("fashion-mnist", 240))


def cells_named(patterns: Sequence[str], cells: Sequence[Cell] = CELLS) -> list[Cell]:
    """Choose cells by name, ``*`` for any text, in their own order; all without a pattern.

    Raises:
        NotFound: a pattern fits no cell.
    """
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise NotFound(
                "there is no such cell",
                field="cells",
                limit=[cell.name for cell in cells],
                value=pattern,
                hint="`*` stands for any text, as in 'digits-*'",
            )
    return [
        cell
        for cell in cells
        if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)
    ]
