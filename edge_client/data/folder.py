"""Load a folder of images by class, with train/ and test/ or with a held-out share."""

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
class _Scan:
    """The readable files below one folder.

    Attributes:
        files: class and path of each, ordered by path.
    """

    files: tuple[tuple[str, Path], ...]
    skipped: tuple[Skipped, ...]

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.files)


def load_folder(root: Path, *, held_out: float, seed: int) -> Dataset:
    """Load root/CLASS/**/image, or root/train/CLASS/… and root/test/CLASS/….

    Every file is decoded once; unreadable files and classes without a readable image are listed as
    skipped. Only paths stay in memory. `file_groups` gives the images' groups.

    Args:
        root: the data folder.
        held_out: share of each class to test on, if there is no folder test, testing, val, valid or
            validation.
        seed: determines the held-out images.

    Raises:
        MissingDataError: ``root`` is not a folder.
        EmptyDatasetError: there is no readable training image.
        PartitionError: ``held_out`` is out of range.
    """
    if not root.is_dir():
        raise MissingDataError("--data folder", limit="a folder", value=str(root))
    train_folder = _first_folder(root, TRAIN_NAMES)
    test_folder = _first_folder(root, TEST_NAMES)
    if train_folder is None:
        return hold_out(_image_set(root, root, _scan(root)), held_out, seed)
    train = _image_set(root, train_folder, _scan(train_folder))
    if test_folder is None:
        return hold_out(train, held_out, seed)
    return Dataset(train, _test_set(root, _scan(test_folder), train))


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _scan(root: Path) -> _Scan:
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
    return _Scan(tuple(files), tuple(skipped))


def _image_set(root: Path, folder: Path, scan: _Scan) -> ImageSet:
    """Return the set of a folder's readable images; ``root`` is the data folder."""
    if not scan.files:
        skipped = "; ".join(f"{entry.path} ({entry.reason})" for entry in scan.skipped[:5])
        raise EmptyDatasetError(
            "--data folder",
            limit=f"{folder}/CLASS/IMAGE with a suffix of {' '.join(sorted(SUFFIXES))}",
            value="no readable image",
            hint=f"Skipped: {skipped}" if skipped else "",
        )
    names = tuple(sorted(scan.classes))
    label = {name: i for i, name in enumerate(names)}
    return ImageSet(
        FileStore([path for _, path in scan.files], root),
        torch.tensor([label[name] for name, _ in scan.files], dtype=torch.int64),
        names,
        scan.skipped,
    )


def _test_set(root: Path, scan: _Scan, train: ImageSet) -> ImageSet:
    """Return the set of test images whose class has training images; list the others as skipped."""
    label = {name: i for i, name in enumerate(train.class_names)}
    known = [(label[name], path) for name, path in scan.files if name in label]
    unknown = tuple(
        Skipped(name, "test images of a class without training images")
        for name in sorted(scan.classes - label.keys())
    )
    untested = tuple(
        Skipped(name, "a class without test images")
        for name in train.class_names
        if name not in scan.classes
    )
    labels = torch.tensor([number for number, _ in known], dtype=torch.int64)
    return replace(
        train,
        store=FileStore([path for _, path in known], root),
        labels=labels,
        skipped=scan.skipped + unknown + untested,
    )
