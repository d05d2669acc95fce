"""Load a folder with one sub-folder for each class, below train/ and test/ or directly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_client.data.batches import Preprocessing
from edge_client.data.dataset import Dataset, hold_out
from edge_client.data.errors import EmptyDatasetError
from edge_client.data.first_read import read_once
from edge_client.data.image_set import FileStore, ImageSet
from edge_client.data.layout import ClassFiles, Layout, list_files
from edge_client.data.pictures import SUFFIXES, WHITE, Colour
from edge_client.data.reading import Progress
from edge_client.data.remarks import Remark, as_text, summarise


def load_folder(
    root: Path,
    *,
    held_out: float,
    seed: int,
    class_names: Sequence[str] | None = None,
    background: Colour = WHITE,
    preprocessing: Preprocessing | None = None,
    cache_bytes: int = 0,
    progress: Progress = lambda done, total: None,
) -> Dataset:
    """Load root/CLASS/**/image, or root/train/CLASS/… and root/test/CLASS/….

    Every file is decoded once. The sets list unread files in ``skipped``, and unusual files in
    ``noticed``. They keep the paths in memory, and resized images within ``cache_bytes``.
    `find_layout` decides between the two forms, and `file_groups` finds the groups of the images. A
    class may lack training images or test images.

    Args:
        root: the data folder.
        held_out: share of each class held out for testing, if there is no test folder.
        seed: seed of the choice of held-out images.
        class_names: class names of the run; they show whether ``train`` is a class.
        background: colour behind transparent parts, (R, G, B).
        preprocessing: preprocessing of the run's model; None: no resized images are kept.
        cache_bytes: memory budget of the resized images, in bytes.
        progress: called with the number of files read and of all files.

    Raises:
        MissingDataError: ``root`` is not a folder.
        EmptyDatasetError: there is no readable training image.
        PartitionError: ``held_out`` is out of range.
    """
    listed = list_files(root, class_names, "--data folder")
    train, test = listed.train, listed.test
    files = train.files + (() if test is None else test.files)
    paths = [path for _, path in files]
    first = read_once(paths, background, preprocessing, cache_bytes, progress)

    def is_readable(entry: tuple[str, Path]) -> bool:
        return entry[1] not in first.failed

    train_files = list(filter(is_readable, train.files))
    test_files = [] if test is None else list(filter(is_readable, test.files))
    skipped = [Remark(as_text(path), reason) for path, reason in first.failed.items()]
    skipped += [*listed.skipped, *_without_images(train, train_files)]
    if test is not None:
        skipped += _without_images(test, test_files)
    skipped.sort(key=lambda entry: entry.path)
    if not train_files:
        raise _no_images(listed.layout, skipped)
    names = tuple(sorted({name for name, _ in train_files + test_files}))

    def image_set(entries: Sequence[tuple[str, Path]], noticed: Sequence[Remark]) -> ImageSet:
        store = FileStore([path for _, path in entries], root, background, first.decoded)
        labels = np.array([names.index(name) for name, _ in entries], np.int64)
        return ImageSet(store, labels, names, tuple(skipped), tuple(noticed))

    if test is None:
        return hold_out(image_set(train_files, first.noticed), held_out, seed)
    noticed = [*first.noticed, *_one_sided(names, train_files, test_files)]
    return Dataset(image_set(train_files, noticed), image_set(test_files, noticed))


def _without_images(found: ClassFiles, readable: Sequence[tuple[str, Path]]) -> list[Remark]:
    named = {name for name, _ in readable}
    return [
        Remark(as_text(folder), "a class without a readable image")
        for folder, name in found.folders.items()
        if name not in named
    ]


def _one_sided(
    names: Sequence[str], train: Sequence[tuple[str, Path]], test: Sequence[tuple[str, Path]]
) -> list[Remark]:
    """Return a remark on each class that lacks training images or test images."""
    trained, tested = {name for name, _ in train}, {name for name, _ in test}
    return [
        Remark(
            name,
            "a class without training images" if name in tested else "a class without test images",
        )
        for name in names
        if name not in trained or name not in tested
    ]


def _no_images(layout: Layout, skipped: Sequence[Remark]) -> EmptyDatasetError:
    suffixes = " ".join(sorted(SUFFIXES))
    return EmptyDatasetError(
        "--data folder",
        limit=f"{as_text(layout.train)}/CLASS/IMAGE with a suffix of {suffixes}",
        value="no readable image",
        hint=f"Skipped: {summarise(skipped)}" if skipped else "",
    )
