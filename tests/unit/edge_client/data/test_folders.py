"""Folders of images: links, names, skipped files, and train/ and test/ as classes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from edge_client.data.dataset import Dataset, hash_names
from edge_client.data.errors import EmptyDatasetError
from edge_client.data.remarks import as_text
from edge_client.data.sources import load_dataset
from edge_client.data.walk import find_pictures

CAFE = "caf\u00e9"

DECOMPOSED = unicodedata.normalize("NFD", CAFE)


def write_class(folder: Path, count: int = 4, shade: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("L", (9, 9), 200)
        image.putpixel((number, number), shade)
        image.save(folder / f"{number}.png")


def load(root: Path, names: tuple[str, ...] | None = None) -> Dataset:
    return load_dataset(f"folder:{root}", held_out=0.25, class_names=names)


def counts(data: Dataset) -> dict[str, int]:
    both = (data.train.class_counts() + data.test.class_counts()).tolist()
    return dict(zip(data.class_names, both, strict=True))


def reasons(data: Dataset, root: Path) -> dict[str, str]:
    return {os.path.relpath(entry.path, root): entry.reason for entry in data.skipped}


# Links


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    write_class(tmp_path / "P" / "square")
    write_class(tmp_path / "P" / "round")
    write_class(tmp_path / "archive" / "2024", 6)
    (tmp_path / "P" / "square" / "2024").symlink_to(tmp_path / "archive" / "2024")
    write_class(tmp_path / "elsewhere", 5)
    (tmp_path / "P" / "oval").symlink_to(tmp_path / "elsewhere")
    data = load(tmp_path / "P")
    assert counts(data) == {"oval": 5, "round": 4, "square": 10}
    assert data.skipped == ()


def test_loops_of_links_end_and_are_named(tmp_path: Path) -> None:
    root = tmp_path / "P"
    write_class(root / "square")
    write_class(tmp_path / "beside", 3)
    (root / "square" / "up").symlink_to(root)
    (root / "square" / "out").symlink_to(tmp_path)
    (root / "square" / "self").symlink_to(root / "square" / "self")
    (root / "square" / "nothing").symlink_to(tmp_path / "absent")
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "back").symlink_to(tmp_path / "far")
    (root / "square" / "far").symlink_to(tmp_path / "far")
    data = load(root)
    assert counts(data) == {"square": 4}
    named = reasons(data, root)
    assert "leads back" in named["square/up"]
    assert "leads back" in named["square/out"]
    assert named["square/self"] == "a loop of links"
    assert named["square/nothing"] == "a link to nothing"
    assert "leads back" in named["square/far/deep/back"]


def test_a_folder_inside_is_read_where_it_lies_and_not_again_by_a_link(tmp_path: Path) -> None:
    write_class(tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    write_class(tmp_path / "a" / "own", 2)
    data = load(tmp_path)
    assert counts(data) == {"a": 2, "b": 4}
    assert "already read" in reasons(data, tmp_path)["a/link"]


def test_predicting_lists_the_same_files_as_joining(tmp_path: Path) -> None:
    write_class(tmp_path / "P" / "cat", 2)
    write_class(tmp_path / "more", 3)
    (tmp_path / "P" / "cat" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "P" / "cat" / "._0.png").write_bytes(b"no picture")
    write_class(tmp_path / "P" / "cat" / "__MACOSX", 1)
    (tmp_path / "P" / "cat" / "x.heic").write_bytes(b"")
    files, skipped = find_pictures(tmp_path / "P" / "cat")
    data = load(tmp_path / "P")
    joined = data.train.store.paths + data.test.store.paths
    assert sorted(files) == sorted(joined)
    assert len(files) == 5
    assert {entry.reason for entry in skipped} == {entry.reason for entry in data.skipped}
    assert "2 hidden or machine-made entries skipped: ._0.png, __MACOSX" in {
        entry.reason for entry in skipped
    }
    assert ".heic is not supported: save it as JPEG or PNG" in {entry.reason for entry in skipped}


def test_a_data_folder_that_is_a_link_is_read(tmp_path: Path) -> None:
    write_class(tmp_path / "archive" / "cat")
    (tmp_path / "P").symlink_to(tmp_path / "archive")
    assert counts(load(tmp_path / "P")) == {"cat": 4}
    files, skipped = find_pictures(tmp_path / "P")
    assert len(files) == 4
    assert skipped == []


# What cannot be read


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that this process does not own, where permissions apply."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            path.chmod(0o755)
    shutil.rmtree(folder)


@contextlib.contextmanager
def no_superuser() -> Iterator[None]:
    """Drop root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_named(foreign: Path) -> None:
    write_class(foreign / "cat", 5)
    write_class(foreign / "cat" / "closed")
    (foreign / "cat" / "0.png").chmod(0o000)
    for path in (foreign / "cat" / "closed", *(foreign / "cat").glob("*/*.png")):
        path.chmod(0o000)
    with no_superuser():
        data = load(foreign)
    assert counts(data) == {"cat": 4}
    assert reasons(data, foreign) == {
        "cat/0.png": "cannot be read: Permission denied",
        "cat/closed": "the folder cannot be listed: Permission denied",
    }


def test_pipes_are_named_and_not_waited_for(tmp_path: Path) -> None:
    write_class(tmp_path / "cat")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    data = load(tmp_path)
    assert reasons(data, tmp_path) == {"cat/pipe.png": "not a regular file"}


# Names


@pytest.mark.parametrize("names", [(CAFE, "bar"), (DECOMPOSED, "bar")])
def test_names_are_compared_in_one_unicode_form(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_class(tmp_path / DECOMPOSED)
    write_class(tmp_path / "bar")
    data = load(tmp_path, names)
    assert counts(data) == {CAFE: 4, "bar": 4}
    assert data.skipped == data.noticed == ()
    assert hash_names(names) == hash_names((CAFE, "bar"))


def test_two_folders_of_one_name_are_one_class_and_named(tmp_path: Path) -> None:
    write_class(tmp_path / CAFE)
    write_class(tmp_path / DECOMPOSED, 3, shade=9)
    write_class(tmp_path / "bar")
    data = load(tmp_path)
    assert counts(data) == {"bar": 4, CAFE: 7}
    assert "the names differ in Unicode form only" in reasons(data, tmp_path)[DECOMPOSED]


def test_a_class_that_is_no_text_is_named_with_escapes(tmp_path: Path) -> None:
    write_class(Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xe9pe")))
    write_class(tmp_path / "cat")
    broken = os.fsdecode(os.fsencode(tmp_path) + b"/cat/broken\xff.jpg")
    Path(broken).write_bytes(b"no picture")
    data = load(tmp_path)
    assert counts(data) == {"cat": 4, "c\\xe9pe": 4}
    assert list(reasons(data, tmp_path)) == ["cat/broken\\xff.jpg"]
    hash_names(data.class_names)
    "".join(entry.path for entry in data.skipped).encode()


def test_text_keeps_its_form_and_control_characters_are_escaped() -> None:
    assert as_text("photos/caf\u00e9 \u4e2d.png") == "photos/caf\u00e9 \u4e2d.png"
    assert as_text("a\x1b[31m\nb") == "a\\x1b[31m\\x0ab"
    assert as_text("x\ud800y").isascii()


def test_classes_that_the_run_or_the_device_lacks_are_said_once(tmp_path: Path) -> None:
    for name in ("cat", "dog", "emu"):
        write_class(tmp_path / name)
    data = load(tmp_path, ("ant", "bee", "cat", "dog"))
    assert [(e.path, e.reason) for e in data.noticed] == [
        ("ant, bee", "no training images of these classes of the run")
    ]
    assert {entry.path for entry in data.skipped} == {"emu"}


def test_all_test_pictures_count_whatever_is_trained(tmp_path: Path) -> None:
    write_class(tmp_path / "train" / "sound", 9)
    write_class(tmp_path / "test" / "sound", 5)
    write_class(tmp_path / "test" / "broken", 7)
    data = load(tmp_path, ("broken", "sound"))
    assert data.train.class_counts().tolist() == [0, 9]
    assert data.test.class_counts().tolist() == [7, 5]


def test_pictures_of_almost_one_value_and_conversions_are_noticed(tmp_path: Path) -> None:
    write_class(tmp_path / "cat")
    Image.new("RGB", (8, 8), (3, 3, 3)).save(tmp_path / "cat" / "flat.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((8, 6), 90).save(tmp_path / "cat" / "turned.png", exif=exif)
    data = load(tmp_path)
    noticed = [(os.path.relpath(entry.path, tmp_path), entry.reason) for entry in data.noticed]
    assert ("cat/flat.png", "almost one value (range 0)") in noticed
    assert ("1 image", "turned upright (EXIF)") in [(e.path, e.reason) for e in data.noticed]
    turned = [
        part.image(index).shape
        for part in (data.train, data.test)
        for index, path in enumerate(part.store.paths)
        if path.name == "turned.png"
    ]
    assert turned == [(3, 8, 6)]


# train/ and test/

BUS_CAR_TRAIN = ("bus", "car", "train")


@pytest.mark.parametrize("names", [None, BUS_CAR_TRAIN, ("bus", "car", "train", "test")])
@pytest.mark.parametrize("nested", [False, True])
def test_a_class_named_train_is_a_class(
    tmp_path: Path, names: tuple[str, ...] | None, nested: bool
) -> None:
    for name in BUS_CAR_TRAIN:
        write_class(tmp_path / name / "2024" if nested else tmp_path / name)
    data = load(tmp_path, names)
    assert {name: n for name, n in counts(data).items() if n} == dict.fromkeys(BUS_CAR_TRAIN, 4)
    assert data.skipped == ()


@pytest.mark.parametrize("names", [None, ("cat", "dog"), ("cat", "dog", "train")])
@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val")])
def test_folders_of_classes_named_train_and_test_divide(
    tmp_path: Path, names: tuple[str, ...] | None, train: str, test: str
) -> None:
    for name in ("cat", "dog"):
        write_class(tmp_path / train / name, 4)
        write_class(tmp_path / test / name, 2)
    write_class(tmp_path / "extra", 3)
    (tmp_path / train / "stray.png").write_bytes((tmp_path / "extra" / "0.png").read_bytes())
    data = load(tmp_path, names)
    assert (len(data.train), len(data.test)) == (8, 4)
    named = reasons(data, tmp_path)
    assert "not read" in named["extra"]
    assert named[f"{train}/stray.png"] == "an image outside the class folders"


def test_a_run_with_a_class_named_train_may_have_a_folder_train_of_classes(tmp_path: Path) -> None:
    for name in BUS_CAR_TRAIN:
        write_class(tmp_path / "train" / name, 3)
        write_class(tmp_path / "test" / name, 1)
    data = load(tmp_path, BUS_CAR_TRAIN)
    assert (len(data.train), len(data.test)) == (9, 3)


def test_train_and_test_of_pictures_are_two_classes(tmp_path: Path) -> None:
    write_class(tmp_path / "train")
    write_class(tmp_path / "test")
    assert counts(load(tmp_path)) == {"test": 4, "train": 4}


def test_a_test_folder_without_classes_and_a_second_one_are_named(tmp_path: Path) -> None:
    write_class(tmp_path / "train" / "cat")
    write_class(tmp_path / "test")
    data = load(tmp_path, ("cat",))
    assert (len(data.train), len(data.test)) == (3, 1)
    assert "without class folders" in reasons(data, tmp_path)["test"]
    shutil.rmtree(tmp_path / "test")
    write_class(tmp_path / "test" / "cat", 2)
    write_class(tmp_path / "val" / "cat", 5)
    data = load(tmp_path, ("cat",))
    assert len(data.test) == 2
    assert "another test folder" in reasons(data, tmp_path)["val"]


def test_folders_of_the_wrong_names_are_refused_by_their_names(tmp_path: Path) -> None:
    write_class(tmp_path / "train" / "Katze")
    write_class(tmp_path / "test" / "Katze")
    with pytest.raises(Exception, match="Katze"):
        load(tmp_path, ("cat", "dog"))


def test_a_folder_of_bad_files_says_why(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").symlink_to(tmp_path / "absent")
    with pytest.raises(EmptyDatasetError, match="a link to nothing"):
        load(tmp_path)
