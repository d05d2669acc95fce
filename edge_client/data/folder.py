"""A folder of images by class, with `train/` and `test/` below it or a held-out share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edge_client.data.dataset import Dataset, hold_out
from edge_client.data.decode import check_files
from edge_client.data.errors import EmptyDatasetError, MissingDataError
from edge_client.data.image_set import FileStore, ImageSet, Skipped

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

TRAIN_NAMES = ("train", "training")

TEST_NAMES = ("test", "testing", "val", "valid", "validation")


@dataclass(frozen=True)
class _Found:
    """The readable files below one folder: paths and their class, in the order of their names."""

    files: tuple[tuple[str, Path], ...]
    skipped: tuple[Skipped, ...]

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.files)


def load_folder(root: Path, *, held_out: float, seed: int) -> Dataset:
    """Read root/CLASS/**/image, or root/train/CLASS/… and root/test/CLASS/….

    Every file is decoded once: what cannot be is skipped and named, and so is a class without a
    readable image. Without a test folder (test, testing, val, valid or validation) a share of
    each class is held out, by seed. Only paths are kept in memory. Groups of the images, should
    anybody ask, are as `file_groups` finds them.
    Raises MissingDataError, EmptyDatasetError, PartitionError.
    """
    if not root.is_dir():
        raise MissingDataError("--data folder", limit="a folder", value=str(root))
    train_folder = _below(root, TRAIN_NAMES)
    test_folder = _below(root, TEST_NAMES)
    if train_folder is None:
        found = _scan(root)
        return hold_out(_image_set(root, root, found), held_out, seed)
    found = _scan(train_folder)
    train = _image_set(root, train_folder, found)
    if test_folder is None:
        return hold_out(train, held_out, seed)
    return Dataset(train, _test_set(root, _scan(test_folder), train))


def _below(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _scan(root: Path) -> _Found:
    skipped: list[Skipped] = []
    candidates: list[tuple[str, Path]] = []
    folders: list[Path] = []
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(entry)
        elif entry.suffix.lower() in SUFFIXES:
            skipped.append(Skipped(str(entry), "an image outside the class folders"))
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_dir() or any(part.startswith(".") for part in path.parts[len(root.parts) :]):
                continue
            if path.suffix.lower() in SUFFIXES:
                candidates.append((folder.name, path))
            else:
                skipped.append(Skipped(str(path), "not named like an image file"))
    reasons = check_files([path for _, path in candidates])
    files: list[tuple[str, Path]] = []
    for candidate, reason in zip(candidates, reasons, strict=True):
        if reason is None:
            files.append(candidate)
        else:
            skipped.append(Skipped(str(candidate[1]), reason))
    readable = {name for name, _ in files}
    skipped += [
        Skipped(str(folder), "a class without a readable image")
        for folder in folders
        if folder.name not in readable
    ]
    return _Found(tuple(files), tuple(skipped))


def _image_set(root: Path, folder: Path, found: _Found) -> ImageSet:
    """What was found in a folder of the data folder root."""
    if not found.files:
        named = "; ".join(f"{entry.path} ({entry.reason})" for entry in found.skipped[:5])
        raise EmptyDatasetError(
            "--data folder",
            limit=f"{folder}/CLASS/IMAGE with a suffix of {' '.join(sorted(SUFFIXES))}",
            value="no readable image",
            hint=f"Skipped: {named}" if named else "",
        )
    names = tuple(sorted(found.classes))
    place = {name: i for i, name in enumerate(names)}
    return ImageSet(
        FileStore([path for _, path in found.files], root),
        torch.tensor([place[name] for name, _ in found.files], dtype=torch.int64),
        names,
        found.skipped,
    )


def _test_set(root: Path, found: _Found, train: ImageSet) -> ImageSet:
    """The test images of the classes there is something to learn of; the others are named."""
    place = {name: i for i, name in enumerate(train.class_names)}
    known = [(place[name], path) for name, path in found.files if name in place]
    unknown = tuple(
        Skipped(name, "test images of a class without training images")
        for name in sorted(found.classes - place.keys())
    )
    untested = tuple(
        Skipped(name, "a class without test images")
        for name in train.class_names
        if name not in found.classes
    )
    labels = torch.tensor([label for label, _ in known], dtype=torch.int64)
    return replace(
        train,
        store=FileStore([path for _, path in known], root),
        labels=labels,
        skipped=found.skipped + unknown + untested,
    )
