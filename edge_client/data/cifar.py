"""Load CIFAR-10 and CIFAR-100 in their binary form; the pickled Python form is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.data.dataset import Dataset
from edge_client.data.download import read_members
from edge_client.data.errors import DataFormatError, DatasetDownloadError, PickledDataError
from edge_client.data.image_set import ArrayStore, ImageSet

_PIXELS = 3 * 32 * 32

_SITE = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class CifarForm:
    """The files of one of the two sets.

    Attributes:
        folder: folder of the binary files, in the archive and on disk.
        archive: file name of the archive.
        md5: MD5 of the archive, as published by the authors.
        train: files of the training images.
        test: files of the test images.
        names: file of the class names.
        label_bytes: number of label bytes before each image; the last one is the label.
        classes: number of classes.
        pickled: folder of the pickled Python form.
    """

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int
    classes: int
    pickled: str


FORMS = {
    "CIFAR10": CifarForm(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        names="batches.meta.txt",
        label_bytes=1,
        classes=10,
        pickled="cifar-10-batches-py",
    ),
    "CIFAR100": CifarForm(
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        train=("train.bin",),
        test=("test.bin",),
        names="fine_label_names.txt",
        label_bytes=2,
        classes=100,
        pickled="cifar-100-python",
    ),
}


def load_cifar(name: str, root: Path) -> Dataset:
    """Load CIFAR10 or CIFAR100.

    Args:
        name: name of the set.
        root: folder that holds the unpacked binary files, their folder, or the archive. If it holds
            none of these, the archive is downloaded to it.

    Raises:
        PickledDataError: ``root`` has only the Python form.
        DatasetDownloadError: the download failed.
        DataFormatError: a file does not match the binary form.
    """
    form = FORMS[name]
    folder = next((path for path in (root / form.folder, root) if _is_complete(path, form)), None)
    if folder is None:
        folder = root / form.folder
        _unpack(form, root, name)
    names = _class_names(folder / form.names, form)
    return Dataset(_read(folder, form.train, form, names), _read(folder, form.test, form, names))


def _files(form: CifarForm) -> tuple[str, ...]:
    return (*form.train, *form.test, form.names)


def _is_complete(folder: Path, form: CifarForm) -> bool:
    return all((folder / name).is_file() for name in _files(form))


def _unpack(form: CifarForm, root: Path, name: str) -> None:
    archive = root / form.archive
    expected = f"{form.archive} in {root}, or {', '.join(_files(form))} in {root / form.folder}"
    if not archive.is_file():
        if (root / form.pickled).exists() or (root / f"{form.pickled}.tar.gz").exists():
            raise PickledDataError(
                name,
                limit=expected,
                value=form.pickled,
                hint=f"Use the binary form: {_SITE}/{form.archive}",
            )
        _download(form, root, name, expected)
    read_members(archive, form.folder, _files(form), root / form.folder)


def _download(form: CifarForm, root: Path, name: str, expected: str) -> None:
    hint = f"Download {_SITE}/{form.archive} (the binary form) and put it there."
    try:
        from split_model.backbone.libraries import torchvision

        torchvision.datasets.utils.download_url(
            f"{_SITE}/{form.archive}", str(root), form.archive, form.md5
        )
    except (OSError, RuntimeError, ImportError) as error:
        raise DatasetDownloadError(name, limit=expected, value=str(error), hint=hint) from error


def _class_names(path: Path, form: CifarForm) -> tuple[str, ...]:
    names = tuple(filter(None, map(str.strip, path.read_text("utf-8").splitlines())))
    if len(names) != form.classes:
        raise DataFormatError(f"class names in {path}", limit=form.classes, value=len(names))
    return names


def _read(folder: Path, files: Sequence[str], form: CifarForm, names: tuple[str, ...]) -> ImageSet:
    record = form.label_bytes + _PIXELS  # bytes
    sizes = [(folder / name).stat().st_size for name in files]
    for name, size in zip(files, sizes, strict=True):
        if size == 0 or size % record:
            raise DataFormatError(
                f"size of {folder / name}", limit=f"a multiple of {record}", value=size
            )
    total = sum(sizes) // record
    pixels = np.empty((total, 3, 32, 32), np.uint8)
    labels = np.empty(total, np.int64)
    done = 0
    for name in files:
        raw = np.fromfile(folder / name, np.uint8).reshape(-1, record)  # [m, record]
        labels[done : done + len(raw)] = raw[:, form.label_bytes - 1]
        pixels[done : done + len(raw)] = raw[:, form.label_bytes :].reshape(-1, 3, 32, 32)
        done += len(raw)
    return ImageSet(ArrayStore(pixels), labels, names)
