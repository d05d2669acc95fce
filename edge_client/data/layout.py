"""Find the class folders of a data folder: whether train/ and test/ divide it, or are classes.

``train`` may be a class: a vehicle, say. A folder that is named so is structure if it holds class
folders, and nothing speaks for a class:

- With the run's class names: one of the folders in it is named as a class of the run, and either
  its own name is no class of the run, or no other class of the run stands beside it. If none in it
  is a class of the run, it is structure unless it, or a folder beside it, is one.
- Without them: it holds folders, and the test folder beside it holds one of the same name, or no
  other folder stands beside the two.

A test folder is structure if the training folder is and it holds folders. Case does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_client.data.errors import MissingDataError
from edge_client.data.pictures import SUFFIXES
from edge_client.data.remarks import Skipped, as_text, class_name
from edge_client.data.walk import PictureWalk

TRAIN_NAMES = ("train", "training")

TEST_NAMES = ("test", "testing", "val", "valid", "validation")


@dataclass(frozen=True)
class Layout:
    """Where the class folders of a data folder lie.

    Attributes:
        train: of the training images, or of all images where ``test`` is None.
        test: of the test images; None: a share of the others is held out.
        unused: folders that are not read, and why.
    """

    train: Path
    test: Path | None = None
    unused: tuple[Skipped, ...] = field(default=())


@dataclass(frozen=True)
class ClassFiles:
    """The picture files below one folder of class folders.

    Attributes:
        files: class and path of each, ordered by class folder and path.
        folders: the class of each class folder.
        skipped: what is left out, and why.
    """

    files: tuple[tuple[str, Path], ...]
    folders: dict[Path, str]
    skipped: tuple[Skipped, ...]


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
    def skipped(self) -> tuple[Skipped, ...]:
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
    """Find the class folders.

    Args:
        root: the data folder.
        class_names: of the run, if they are known.
    """
    walk = PictureWalk(root)
    folders, files = walk.list_folder(root)
    train = _named(folders, TRAIN_NAMES)
    if train is None:
        return Layout(root)
    tests = [folder for folder in folders if folder.name.casefold() in TEST_NAMES]
    test = min(tests, key=lambda f: TEST_NAMES.index(f.name.casefold()), default=None)
    inside, in_test = _classes_in(train), _classes_in(test) if test else set()
    beside = [f for f in folders if f != train and f not in tests]
    if not inside or not _is_structure(train, inside, in_test, beside, class_names):
        return Layout(root)
    reason = f"not read: {as_text(train.name)}/ is taken for the training images"
    unused = walk.skipped + [Skipped(as_text(folder), reason) for folder in beside]
    reason = "an image outside the class folders"
    unused += [Skipped(as_text(f), reason) for f in files if f.suffix.lower() in SUFFIXES]
    if test is not None and not in_test:
        unused.append(Skipped(as_text(test), "a test folder without class folders"))
        test = None
    reason = "a second test folder is not read"
    unused += [Skipped(as_text(f), reason) for f in tests if test is not None and f != test]
    return Layout(train, test, tuple(unused))


def find_classes(folder: Path) -> ClassFiles:
    """List the picture files in the class folders of a folder; none is opened."""
    walk = PictureWalk(folder)
    folders, files = walk.list_folder(folder)
    walk.skipped += [
        Skipped(as_text(file), "an image outside the class folders")
        for file in files
        if file.suffix.lower() in SUFFIXES
    ]
    classes = {entry: class_name(entry.name) for entry in folders}
    for entry, name in classes.items():
        walk.add_tree(name, entry)
    walk.follow_links()
    walk.skipped += _merged(classes)
    return ClassFiles(tuple(sorted(walk.files, key=lambda f: f[1])), classes, tuple(walk.skipped))


def _merged(classes: dict[Path, str]) -> list[Skipped]:
    """Name class folders whose names differ in their Unicode form alone: they are one class."""
    names = list(classes.values())
    return [
        Skipped(
            as_text(folder), f"one class with another folder named {name}, in another Unicode form"
        )
        for folder, name in classes.items()
        if names.count(name) > 1 and folder.name != name
    ]


def _is_structure(
    train: Path,
    inside: Collection[str],
    in_test: Collection[str],
    beside: Sequence[Path],
    class_names: Sequence[str] | None,
) -> bool:
    if class_names is None:
        return not beside or bool(set(inside) & set(in_test))
    known = {class_name(name) for name in class_names}
    is_class = class_name(train.name) in known
    classes_beside = any(class_name(folder.name) in known for folder in beside)
    if known & set(inside):
        return not (is_class and classes_beside)
    return not is_class and not classes_beside


def _named(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    found = [folder for folder in folders if folder.name.casefold() in names]
    return min(found, key=lambda folder: names.index(folder.name.casefold()), default=None)


def _classes_in(folder: Path) -> set[str]:
    folders, _ = PictureWalk(folder).list_folder(folder)
    return {class_name(inside.name) for inside in folders}
