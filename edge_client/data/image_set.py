"""Labelled images, read one at a time, in memory or from files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edge_client.data.decode import check_files, decode_file
from edge_client.data.errors import ClassMismatchError, DataFormatError, PartitionError

FILE = "groups.csv"

SEPARATOR = "_"

HOW = (
    f"Put {FILE} with the columns file,group into the data folder (file: the path from there), or "
    f"name every image GROUP{SEPARATOR}…, such as ann{SEPARATOR}01.png; data without ids take "
    "another partition."
)


def file_groups(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """The group of every image below root, in the order of paths.

    From root/groups.csv, if it is there, and else the part of each file's name before its first
    `_`. Raises PartitionError if an image has no group, DataFormatError if groups.csv is none.
    """
    table = root / FILE
    known = _read(table) if table.is_file() else None
    return tuple(_group(root, path, known) for path in paths)


def no_groups(what: str) -> PartitionError:
    """The error for a set whose images belong to nobody that is known."""
    return PartitionError(f"groups of {what}", limit="an id for each image", value=None, hint=HOW)


def _group(root: Path, path: Path, known: dict[str, str] | None) -> str:
    place = path.relative_to(root).as_posix()
    if known is not None:
        group = known.get(place, "")
        if not group:
            raise PartitionError(
                "group of an image", limit=f"a row in {root / FILE}", value=place, hint=HOW
            )
        return group
    group, separator, _ = path.name.partition(SEPARATOR)
    if not (group and separator):
        raise PartitionError(
            "group of an image", limit=f"a name GROUP{SEPARATOR}…", value=place, hint=HOW
        )
    return group


def _read(table: Path) -> dict[str, str]:
    """Group by file, as groups.csv has them."""
    groups: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            if not {"file", "group"} <= set(rows.fieldnames or ()):
                raise DataFormatError(
                    f"columns of {table}",
                    limit="file,group",
                    value=",".join(rows.fieldnames or ()),
                )
            for row in rows:
                place, group = ((row[name] or "").strip() for name in ("file", "group"))
                place = PurePosixPath(place).as_posix()  # ./cat/1.png is cat/1.png
                if groups.setdefault(place, group) != group:
                    raise DataFormatError(
                        f"groups of {place} in {table}",
                        limit=groups[place],
                        value=group,
                        hint="A file is in one group.",
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(
            str(table), limit="CSV in UTF-8", value="unreadable", hint=str(error)
        ) from error
    return groups


@dataclass(frozen=True)
class Skipped:
    """Something that was left out of a set: where it lies, and why."""

    path: str
    reason: str


class ImageStore(Protocol):
    """Where the pixels of a set come from."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """One image: uint8 (3, H, W). Raises CorruptImageError."""
        ...

    def unreadable(self) -> dict[int, Skipped]:
        """The images that cannot be read now, by their positions."""
        ...

    def take(self, indices: Tensor) -> ImageStore:
        """A store of these images alone, in this order; indices: int64 (n,)."""
        ...

    def groups(self) -> tuple[str, ...]:
        """The natural group of every image. Raises PartitionError, DataFormatError."""
        ...


class ArrayStore:
    """Images of one size in memory: uint8 (n, C, H, W), C = 1 (grey) or 3."""

    def __init__(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise DataFormatError(
                "pixels",
                limit="uint8 (n, 1 or 3, H, W)",
                value=f"{pixels.dtype} {tuple(pixels.shape)}",
            )
        self.pixels = pixels

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def read(self, index: int) -> Tensor:
        """One image: uint8 (3, H, W), a view. Grey is shown on all three channels."""
        image = self.pixels[index]  # (C, H, W)
        return image.expand(3, -1, -1)

    def unreadable(self) -> dict[int, Skipped]:
        """None: they are in memory."""
        return {}

    def take(self, indices: Tensor) -> ArrayStore:
        """A copy of these images alone, so that the rest can be freed."""
        return ArrayStore(self.pixels[indices])

    def groups(self) -> tuple[str, ...]:
        """Raises PartitionError: nothing is known but pixels."""
        raise no_groups("this set")


class FileStore:
    """One image file each, decoded when it is read. root: the data folder that they are of."""

    def __init__(self, paths: Sequence[Path], root: Path) -> None:
        self.paths = tuple(paths)
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """One image: uint8 (3, H, W). Raises CorruptImageError."""
        return decode_file(self.paths[index])

    def unreadable(self) -> dict[int, Skipped]:
        """Those whose files are gone or damaged by now."""
        reasons = check_files(self.paths)
        return {
            index: Skipped(str(path), reason)
            for index, (path, reason) in enumerate(zip(self.paths, reasons, strict=True))
            if reason is not None
        }

    def take(self, indices: Tensor) -> FileStore:
        """A store of these files alone."""
        return FileStore([self.paths[i] for i in indices.tolist()], self.root)

    def groups(self) -> tuple[str, ...]:
        """As `file_groups` finds them. Raises PartitionError, DataFormatError."""
        return file_groups(self.root, self.paths)


@dataclass(frozen=True)
class ImageSet:
    """A map-style set of labelled images.

    store: the pixels of n images; labels: int64 (n,), each an index into class_names;
    skipped: what was left out while the set was read. Raises DataFormatError if these disagree.
    """

    store: ImageStore
    labels: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.store),):
            raise DataFormatError(
                "labels",
                limit=f"int64 ({len(self.store)},)",
                value=f"{self.labels.dtype} {tuple(self.labels.shape)}",
            )
        if len(self) == 0:
            return
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise DataFormatError(
                "labels", limit=f"0 to {len(self.class_names) - 1}", value=f"{low} to {high}"
            )

    def __len__(self) -> int:
        return len(self.store)

    def label(self, index: int) -> int:
        """The class of one image, an index into class_names."""
        return int(self.labels[index])

    def image(self, index: int) -> Tensor:
        """One image at its own size: uint8 (3, H, W). Raises CorruptImageError."""
        return self.store.read(index)

    def subset(self, indices: Tensor | np.ndarray[tuple[int], np.dtype[np.int64]]) -> ImageSet:
        """The images at these positions (int64 (m,)), in this order; the classes stay as they are.

        Images in memory are copied, so that the larger set can be freed.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, store=self.store.take(chosen), labels=self.labels[chosen])

    def readable(self) -> ImageSet:
        """Without the images that cannot be read any more; they are named in skipped."""
        lost = self.store.unreadable()
        if not lost:
            return self
        kept = torch.tensor([i for i in range(len(self)) if i not in lost], dtype=torch.int64)
        return replace(self.subset(kept), skipped=self.skipped + tuple(lost.values()))

    def class_counts(self) -> Tensor:
        """How many images each class has: int64 (classes,)."""
        return torch.bincount(self.labels, minlength=len(self.class_names))

    def aligned(self, class_names: Sequence[str]) -> ImageSet:
        """The same images with labels that index class_names, the run's own list.

        Images of other classes are left out and named in skipped. Classes are matched by name.
        Raises ClassMismatchError if the two lists share no name.
        """
        names = tuple(class_names)
        if names == self.class_names:
            return self
        if len(set(names)) != len(names):
            raise ClassMismatchError("class_names", limit="each name once", value=names)
        place = {name: i for i, name in enumerate(names)}
        if not any(name in place for name in self.class_names):
            raise ClassMismatchError(
                "class names",
                limit=f"some of {', '.join(names)}",
                value=", ".join(self.class_names),
                hint="Name the class folders as the run names its classes.",
            )
        table = torch.tensor([place.get(name, -1) for name in self.class_names])
        counts = self.class_counts().tolist()
        foreign = tuple(
            Skipped(name, f"not a class of this run ({count} images)")
            for name, count in zip(self.class_names, counts, strict=True)
            if name not in place and count
        )
        labels = table[self.labels]  # (n,), -1 for a class the run does not have
        kept = torch.nonzero(labels >= 0).flatten()
        store = self.store if len(kept) == len(self) else self.store.take(kept)
        return ImageSet(store, labels[kept], names, self.skipped + foreign)
