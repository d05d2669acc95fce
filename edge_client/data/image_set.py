"""Sets of labelled images, in memory or in files."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_client.data.errors import ClassMismatchError, CorruptImageError, DataFormatError
from edge_client.data.groups import file_groups, no_groups_error
from edge_client.data.pictures import WHITE, Colour, Picture, read_picture
from edge_client.data.remarks import Remark, as_text, compose

Pixels = NDArray[np.uint8]

Labels = NDArray[np.int64]


def channels_first(picture: Picture) -> Pixels:
    """Return a picture's pixels, uint8 [3, H, W]."""
    return picture.pixels.transpose(2, 0, 1).copy()


def decode_file(path: Path, background: Colour = WHITE) -> Pixels:
    """Decode an image file to uint8 [3, H, W].

    Raises:
        CorruptImageError: the file cannot be decoded.
    """
    return channels_first(read_picture(path, background))


def digest_of(image: Pixels) -> bytes:
    """Return a hash of an image, uint8 [3, H, W]."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


class ImageStore(Protocol):
    """The images of a set, without labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """Read one image, uint8 [3, H, W].

        Raises:
            CorruptImageError: the image cannot be decoded.
        """
        ...

    def unreadable(self) -> dict[int, Remark]:
        """Return the images that cannot be read now, by position."""
        ...

    def take(self, indices: Labels) -> ImageStore:
        """Return a store of these images only, in this order; indices: int64 [n]."""
        ...

    def groups(self) -> tuple[str, ...]:
        """Return the natural group of each image.

        Raises:
            PartitionError: the images have no groups.
            DataFormatError: the groups' file is faulty.
        """
        ...

    def digest(self, index: int) -> bytes:
        """Return a hash of one image; empty if the image cannot be decoded."""
        try:
            return digest_of(self.read(index))
        except CorruptImageError:
            return b""  # reading it later reports the error

    def take_resized(self, index: int, form: Hashable) -> Pixels | None:
        """Return an image that was resized when the files were first read, and drop it here.

        Args:
            index: position of the image.
            form: `Preprocessing.form` of the wanted image.

        Returns:
            The image, uint8 [3, S, S]; None: the store has no such image (any more).
        """
        return None

    def drop_resized(self) -> None:
        """Free the resized images that were not taken."""
        return


class ArrayStore(ImageStore):
    """Images of one size in memory, uint8 [n, C, H, W] with C = 1 (grey) or 3."""

    def __init__(self, pixels: Pixels) -> None:
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise DataFormatError(
                "pixels",
                limit="uint8 (n, 1 or 3, H, W)",
                value=f"{pixels.dtype} {tuple(pixels.shape)}",
            )
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Pixels:
        """Return a view of one image, uint8 [3, H, W]; grey is repeated on all channels."""
        image = self.pixels[index]  # [C, H, W]
        return np.broadcast_to(image, (3, *image.shape[1:]))

    def unreadable(self) -> dict[int, Remark]:
        """Return no image: all are in memory."""
        return {}

    def take(self, indices: Labels) -> ArrayStore:
        """Return a store with copies of these images, so that the others can be freed."""
        return ArrayStore(self.pixels[indices])

    def groups(self) -> tuple[str, ...]:
        """Raise PartitionError: the images have no names."""
        raise no_groups_error("this set")


@dataclass(frozen=True)
class Decoded:
    """Hashes and resized images of files that have been decoded once.

    Attributes:
        digests: hash of each image.
        form: `Preprocessing.form` of the resized images.
        resized: resized images, uint8 [3, S, S] each; each is taken once.
    """

    digests: Mapping[Path, bytes]
    form: Hashable
    resized: dict[Path, Pixels]


class FileStore(ImageStore):
    """Images in files, decoded when they are read.

    Args:
        paths: paths of the files, below ``root``.
        root: the data folder.
        background: colour behind transparent parts, (R, G, B).
        decoded: results of an earlier decoding of the files; None: there was none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        root: Path,
        background: Colour = WHITE,
        decoded: Decoded | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.root = root
        self._background = background
        self._decoded = decoded

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Pixels:
        """Read one image, uint8 [3, H, W].

        Raises:
            CorruptImageError: the image cannot be decoded.
        """
        return decode_file(self.paths[index], self._background)

    def unreadable(self) -> dict[int, Remark]:
        """Return the images whose files are missing or damaged now, by position."""
        unreadable = {}
        for index, path in enumerate(self.paths):
            try:
                read_picture(path, self._background)
            except CorruptImageError as error:
                unreadable[index] = Remark(as_text(path), error.hint or "unreadable")
        return unreadable

    def take(self, indices: Labels) -> FileStore:
        """Return a store of these files only."""
        paths = [self.paths[i] for i in indices.tolist()]
        return FileStore(paths, self.root, self._background, self._decoded)

    def groups(self) -> tuple[str, ...]:
        """Return the images' groups; see `file_groups` for sources and errors."""
        return file_groups(self.root, self.paths)

    def digest(self, index: int) -> bytes:
        known = self._decoded.digests.get(self.paths[index]) if self._decoded else None
        return super().digest(index) if known is None else known

    def take_resized(self, index: int, form: Hashable) -> Pixels | None:
        if self._decoded is None or self._decoded.form != form:
            return None
        return self._decoded.resized.pop(self.paths[index], None)

    def drop_resized(self) -> None:
        if self._decoded is not None:
            self._decoded.resized.clear()


@dataclass(frozen=True)
class ImageSet:
    """A set of labelled images.

    Attributes:
        store: the n images.
        labels: indices into ``class_names``, int64 [n].
        class_names: names of the C classes.
        skipped: files and classes that were not loaded, each with the reason.
        noticed: unusual files and classes that were loaded, each with the reason.

    Raises:
        DataFormatError: the labels do not match the images or the classes.
    """

    store: ImageStore
    labels: Labels
    class_names: tuple[str, ...]
    skipped: tuple[Remark, ...] = ()
    noticed: tuple[Remark, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels))
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self.store),):
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

    def image(self, index: int) -> Pixels:
        """Read one image at its original size, uint8 [3, H, W].

        Raises:
            CorruptImageError: the image cannot be decoded.
        """
        return self.store.read(index)

    def subset(self, indices: ArrayLike) -> ImageSet:
        """Return the images at these positions, int64 [m], in this order, with the same classes.

        Images in memory are copied, so that the larger set can be freed.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, store=self.store.take(chosen), labels=self.labels[chosen])

    def readable(self) -> ImageSet:
        """Return the set without unreadable images, which move to ``skipped``."""
        unreadable = self.store.unreadable()
        if not unreadable:
            return self
        positions = [i for i in range(len(self)) if i not in unreadable]
        readable = self.subset(positions)
        return replace(readable, skipped=self.skipped + tuple(unreadable.values()))

    def class_counts(self) -> Labels:
        """Count the images of each class, int64 [C]."""
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def aligned(self, class_names: Sequence[str]) -> ImageSet:
        """Return the set with labels that index ``class_names``; classes are matched by name.

        Names are compared in Unicode normal form C. Images of other classes are dropped, and
        ``skipped`` lists these classes.

        Args:
            class_names: names of the run's classes.

        Raises:
            ClassMismatchError: the two lists share no name, or ``class_names`` has a duplicate.
        """
        names = tuple(compose(name) for name in class_names)
        own = tuple(compose(name) for name in self.class_names)
        if names == self.class_names:
            return self
        if len(set(names)) != len(names):
            raise ClassMismatchError("class_names", limit="each name once", value=names)
        index = {name: i for i, name in enumerate(names)}
        if not any(name in index for name in own):
            raise ClassMismatchError(
                "class names",
                limit=f"some of {', '.join(names)}",
                value=", ".join(self.class_names),
                hint="Name the class folders as the run names its classes.",
            )
        table = np.array([index.get(name, -1) for name in own], np.int64)
        counts = self.class_counts().tolist()
        other_classes = tuple(
            Remark(name, f"not a class of this run ({count} images)")
            for name, count in zip(own, counts, strict=True)
            if name not in index and count
        )
        labels = table[self.labels]  # [n], -1 for a class that the run does not have
        positions = np.flatnonzero(labels >= 0)
        store = self.store if len(positions) == len(self) else self.store.take(positions)
        skipped = self.skipped + other_classes
        return ImageSet(store, labels[positions], names, skipped, self.noticed)
