"""Sets of labelled images, in memory or in files, and the natural groups of their images."""

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

GROUPS_FILE = "groups.csv"

SEPARATOR = "_"

_HINT = (
    f"Put {GROUPS_FILE} with the columns file,group into the data folder (file: the path relative "
    f"to it), or name every image GROUP{SEPARATOR}…, such as ann{SEPARATOR}01.png, or use another "
    "partition."
)


def file_groups(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the group of each image.

    Groups are read from root/groups.csv if it exists; else a group is the part of the file's name
    before its first ``_``.

    Args:
        root: the data folder.
        paths: of the images, below ``root``.

    Raises:
        PartitionError: an image has no group.
        DataFormatError: groups.csv is not readable, or contradicts itself.
    """
    table = root / GROUPS_FILE
    groups = _read_groups(table) if table.is_file() else None
    return tuple(_group(root, path, groups) for path in paths)


def no_groups_error(set_name: str) -> PartitionError:
    """Return the error for a set without groups."""
    field = f"groups of {set_name}"
    return PartitionError(field, limit="an id for each image", value=None, hint=_HINT)


def _group(root: Path, path: Path, groups: dict[str, str] | None) -> str:
    file = path.relative_to(root).as_posix()
    if groups is not None:
        group = groups.get(file, "")
        if not group:
            raise PartitionError(
                "group of an image", limit=f"a row in {root / GROUPS_FILE}", value=file, hint=_HINT
            )
        return group
    group, separator, _ = path.name.partition(SEPARATOR)
    if not (group and separator):
        raise PartitionError(
            "group of an image", limit=f"a name GROUP{SEPARATOR}…", value=file, hint=_HINT
        )
    return group


def _read_groups(table: Path) -> dict[str, str]:
    """Read groups.csv: the group of each file."""
    groups: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream, strict=True)
            if not {"file", "group"} <= set(rows.fieldnames or ()):
                raise DataFormatError(
                    f"columns of {table}",
                    limit="file,group",
                    value=",".join(rows.fieldnames or ()),
                )
            for row in rows:
                file, group = ((row[name] or "").strip() for name in ("file", "group"))
                file = PurePosixPath(file).as_posix()  # ./cat/1.png is cat/1.png
                if groups.setdefault(file, group) != group:
                    raise DataFormatError(
                        f"groups of {file} in {table}",
                        limit=groups[file],
                        value=group,
                        hint="A file has to be in one group only.",
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(
            str(table), limit="CSV in UTF-8", value="unreadable", hint=str(error)
        ) from error
    return groups


@dataclass(frozen=True)
class Skipped:
    """A file or class that a set leaves out, and the reason."""

    path: str
    reason: str


class ImageStore(Protocol):
    """The images of a set, without labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Read one image, uint8 [3, H, W].

        Raises:
            CorruptImageError: the image cannot be decoded.
        """
        ...

    def unreadable(self) -> dict[int, Skipped]:
        """Return the images that cannot be read now, by position."""
        ...

    def take(self, indices: Tensor) -> ImageStore:
        """Return a store of these images only, in this order; indices: int64 [n]."""
        ...

    def groups(self) -> tuple[str, ...]:
        """Return the natural group of each image.

        Raises:
            PartitionError: the images have no groups.
            DataFormatError: the groups' file is faulty.
        """
        ...


class ArrayStore:
    """Images of one size in memory, uint8 [n, C, H, W] with C = 1 (grey) or 3."""

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
        """Return a view of one image, uint8 [3, H, W]; grey is repeated on all channels."""
        image = self.pixels[index]  # [C, H, W]
        return image.expand(3, -1, -1)

    def unreadable(self) -> dict[int, Skipped]:
        """Return no image: all are in memory."""
        return {}

    def take(self, indices: Tensor) -> ArrayStore:
        """Return a store with copies of these images, so that the others can be freed."""
        return ArrayStore(self.pixels[indices])

    def groups(self) -> tuple[str, ...]:
        """Raise PartitionError: the images have no names."""
        raise no_groups_error("this set")


class FileStore:
    """Images in files, decoded when they are read.

    Args:
        paths: of the files, below ``root``.
        root: the data folder.
    """

    def __init__(self, paths: Sequence[Path], root: Path) -> None:
        self.paths = tuple(paths)
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """Read one image, uint8 [3, H, W].

        Raises:
            CorruptImageError: the image cannot be decoded.
        """
        return decode_file(self.paths[index])

    def unreadable(self) -> dict[int, Skipped]:
        """Return the images whose files are missing or damaged now, by position."""
        reasons = check_files(self.paths)
        return {
            index: Skipped(str(path), reason)
            for index, (path, reason) in enumerate(zip(self.paths, reasons, strict=True))
            if reason is not None
        }

    def take(self, indices: Tensor) -> FileStore:
        """Return a store of these files only."""
        return FileStore([self.paths[i] for i in indices.tolist()], self.root)

    def groups(self) -> tuple[str, ...]:
        """Return the images' groups; see `file_groups` for sources and errors."""
        return file_groups(self.root, self.paths)


@dataclass(frozen=True)
class ImageSet:
    """A set of labelled images.

    Attributes:
        store: n images.
        labels: int64 [n], indices into ``class_names``.
        skipped: files and classes that were not loaded, each with the reason.

    Raises:
        DataFormatError: the labels do not match the images or the classes.
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
        """Return one image's class, an index into ``class_names``."""
        return int(self.labels[index])

    def image(self, index: int) -> Tensor:
        """Read one image at its original size, uint8 [3, H, W].

        Raises:
            CorruptImageError: the image cannot be decoded.
        """
        return self.store.read(index)

    def subset(self, indices: Tensor | np.ndarray[tuple[int], np.dtype[np.int64]]) -> ImageSet:
        """Return the images at these positions, int64 [m], in this order, with the same classes.

        Images in memory are copied, so that the larger set can be freed.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, store=self.store.take(chosen), labels=self.labels[chosen])

    def readable(self) -> ImageSet:
        """Return the set without unreadable images; they are listed in ``skipped``."""
        unreadable = self.store.unreadable()
        if not unreadable:
            return self
        positions = [i for i in range(len(self)) if i not in unreadable]
        readable = self.subset(torch.tensor(positions, dtype=torch.int64))
        return replace(readable, skipped=self.skipped + tuple(unreadable.values()))

    def class_counts(self) -> Tensor:
        """Count the images of each class, int64 [C]."""
        return torch.bincount(self.labels, minlength=len(self.class_names))

    def aligned(self, class_names: Sequence[str]) -> ImageSet:
        """Return the set with labels that index ``class_names``; classes are matched by name.

        Images of other classes are left out and listed in ``skipped``.

        Raises:
            ClassMismatchError: the two lists share no name, or ``class_names`` has a duplicate.
        """
        names = tuple(class_names)
        if names == self.class_names:
            return self
        if len(set(names)) != len(names):
            raise ClassMismatchError("class_names", limit="each name once", value=names)
        index = {name: i for i, name in enumerate(names)}
        if not any(name in index for name in self.class_names):
            raise ClassMismatchError(
                "class names",
                limit=f"some of {', '.join(names)}",
                value=", ".join(self.class_names),
                hint="Name the class folders as the run names its classes.",
            )
        table = torch.tensor([index.get(name, -1) for name in self.class_names])
        counts = self.class_counts().tolist()
        other_classes = tuple(
            Skipped(name, f"not a class of this run ({count} images)")
            for name, count in zip(self.class_names, counts, strict=True)
            if name not in index and count
        )
        labels = table[self.labels]  # [n], -1 for a class that the run does not have
        positions = torch.nonzero(labels >= 0).flatten()
        store = self.store if len(positions) == len(self) else self.store.take(positions)
        return ImageSet(store, labels[positions], names, self.skipped + other_classes)
