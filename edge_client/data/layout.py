"""Find the class folders of a data folder.

A folder named ``train`` holds the class folders of the training images, or it is itself a class (a
vehicle, say). It holds the training images if it has sub-folders and one of these rules applies:

- With the run's class names: a sub-folder has the name of a class of the run, and ``train`` is not
  a class of the run or no other folder next to it is one.
- With the run's class names: neither ``train``, nor one of its sub-folders, nor a folder next to it
  is a class of the run.
- Without class names: ``test`` has a sub-folder of the same name as one in ``train``, or there is
  no folder besides ``train`` and ``test``.

``test`` then holds the test images, if it has sub-folders. Upper and lower case are equal.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_client.data.errors import MissingDataError
from edge_client.data.pictures import SUFFIXES
from edge_client.data.remarks import Remark, as_text, class_name
from edge_client.data.walk import PictureWalk

TRAIN_NAMES = ("train", "training")

TEST_NAMES = ("test", "testing", "val", "valid", "validation")


@dataclass(frozen=True)
class Layout:
    """The folders that hold the class folders.

    Attributes:
        train: folder of the training images, or of all images if ``test`` is None.
        test: folder of the test images; None: there is none.
        unused: folders and files that are not read, with the reasons.
    """

    train: Path
    test: Path | None = None
    unused: tuple[Remark, ...] = field(default=())


@dataclass(frozen=True)
class ClassFiles:
    """The picture files in the class folders of one folder.

    Attributes:
        files: class and path of each file, in the order of the paths.
        folders: class of each class folder.
        skipped: skipped files and folders, with the reasons.
    """

    files: tuple[tuple[str, Path], ...]
    folders: dict[Path, str]
    skipped: tuple[Remark, ...]


@dataclass(frozen=True)
class FolderFiles:
    """All picture files of a data folder.

    Attributes:
        layout: where the class folders are.
        train: files of the training images, or of all images if ``test`` is None.
        test: files of the test images; None: the folder has no test folder.
    """

    layout: Layout
    train: ClassFiles
    test: ClassFiles | None

    @property
    def skipped(self) -> tuple[Remark, ...]:
        """Files and folders that are skipped, with the reasons."""
        test = () if self.test is None else self.test.skipped
        return (*self.layout.unused, *self.train.skipped, *test)


def list_files(root: Path, class_names: Sequence[str] | None, field: str) -> FolderFiles:
    """List the picture files of a data folder, without opening any.

    Args:
        root: the data folder.
        class_names: class names of the run; None: they are not known.
        field: name of the folder in an error.

    Raises:
        MissingDataError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise MissingDataError(field, limit="a folder", value=as_text(root))
    layout = find_layout(root, class_names)
    test = None if layout.test is None else find_classes(layout.test)
    return FolderFiles(layout, find_classes(layout.train), test)


def find_layout(root: Path, class_names: Sequence[str] | None) -> Layout:
    """Find the folders that hold the class folders, by the rules of this module.

    Args:
        root: the data folder.
        class_names: class names of the run; None: they are not known.
    """
    walk = PictureWalk(root)
    folders, files = walk.list_folder(root)
    train = _named(folders, TRAIN_NAMES)
    if train is None:
        return Layout(root)
    tests = [folder for folder in folders if folder.name.casefold() in TEST_NAMES]
    test = min(tests, key=lambda f: TEST_NAMES.index(f.name.casefold()), default=None)
    in_train, in_test = _classes_in(train), _classes_in(test) if test else set()
    others = [f for f in folders if f != train and f not in tests]
    if not in_train or not _is_structure(train, in_train, in_test, others, class_names):
        return Layout(root)
    reason = f"not read: {as_text(train.name)}/ holds the training images"
    unused = walk.skipped + [Remark(as_text(folder), reason) for folder in others]
    reason = "an image outside the class folders"
    unused += [Remark(as_text(f), reason) for f in files if f.suffix.lower() in SUFFIXES]
    if test is not None and not in_test:
        unused.append(Remark(as_text(test), "a test folder without class folders"))
        test = None
    reason = "not read: there is another test folder"
    unused += [Remark(as_text(f), reason) for f in tests if test is not None and f != test]
    return Layout(train, test, tuple(unused))


def find_classes(folder: Path) -> ClassFiles:
    """List the picture files in the class folders of a folder, without opening any."""
    walk = PictureWalk(folder)
    folders, files = walk.list_folder(folder)
    walk.skipped += [
        Remark(as_text(file), "an image outside the class folders")
        for file in files
        if file.suffix.lower() in SUFFIXES
    ]
    classes = {entry: class_name(entry.name) for entry in folders}
    for entry, name in classes.items():
        walk.add_tree(name, entry)
    walk.follow_links()
    walk.skipped += _merged(classes)
    return ClassFiles(tuple(sorted(walk.files, key=lambda f: f[1])), classes, tuple(walk.skipped))


def _merged(classes: dict[Path, str]) -> list[Remark]:
    """Return a remark on each class folder whose name has another Unicode form than its class."""
    names = list(classes.values())
    return [
        Remark(
            as_text(folder), f"joined with the folder {name}: the names differ in Unicode form only"
        )
        for folder, name in classes.items()
        if names.count(name) > 1 and folder.name != name
    ]


def _is_structure(
    train: Path,
    in_train: Collection[str],
    in_test: Collection[str],
    others: Sequence[Path],
    class_names: Sequence[str] | None,
) -> bool:
    if class_names is None:
        return not others or bool(set(in_train) & set(in_test))
    known = {class_name(name) for name in class_names}
    is_class = class_name(train.name) in known
    classes_in_others = any(class_name(folder.name) in known for folder in others)
    if known & set(in_train):
        return not (is_class and classes_in_others)
    return not is_class and not classes_in_others


def _named(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    found = [folder for folder in folders if folder.name.casefold() in names]
    return min(found, key=lambda folder: names.index(folder.name.casefold()), default=None)


def _classes_in(folder: Path) -> set[str]:
    folders, _ = PictureWalk(folder).list_folder(folder)
    return {class_name(each.name) for each in folders}
