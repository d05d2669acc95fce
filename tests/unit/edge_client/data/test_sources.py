"""Reading the `--data` text, the folder, the digits, and what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_client.data.dataset import Dataset, limit_per_set
from edge_client.data.download import cache_dir
from edge_client.data.errors import (
    ClassMismatchError,
    CorruptImageError,
    DatasetDownloadError,
    EmptyDatasetError,
    MissingDataError,
    PartitionError,
    SourceError,
    UnknownDatasetError,
)
from edge_client.data.sources import DataSource, load_dataset, parse_source
from tests.support.data import cut_network


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch)


def write_image(path: Path, colour: tuple[int, int, int] = (9, 99, 199), size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_class(folder: Path, count: int, colour: tuple[int, int, int] = (9, 99, 199)) -> None:
    for i in range(count):
        write_image(folder / f"{i}.png", colour)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("folder:/a/b:c", DataSource("folder", "b:c", Path("/a/b:c"))),
        ("torchvision:SVHN", DataSource("torchvision", "SVHN")),
        ("torchvision:SVHN:/data", DataSource("torchvision", "SVHN", Path("/data"))),
        ("digits", DataSource("digits", "digits")),
        ("fashion-mnist", DataSource("fashion-mnist", "fashion-mnist")),
        ("fashion-mnist:/d", DataSource("fashion-mnist", "fashion-mnist", Path("/d"))),
    ],
)
def test_a_source_is_read_and_written_back(text: str, source: DataSource) -> None:
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    "text", ["", "folder", "folder:", "torchvision:", "digits:x", "fashion-mnist:", "csv:x"]
)
def test_an_unreadable_source_names_the_forms(text: str) -> None:
    with pytest.raises(SourceError) as refused:
        parse_source(text)
    assert refused.value.field == "--data"
    assert "folder:PATH" in str(refused.value)


def test_the_digits_are_there_without_torchvision() -> None:
    program = (
        "import sys; from edge_client.data.sources import load_dataset; d = load_dataset('digits');"
        "print(len(d.train) + len(d.test), 'torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["1797", "False"], done.stderr


def test_the_digits_are_rgb_bytes_with_a_stratified_held_out_share() -> None:
    data = load_dataset("digits", held_out=0.2, seed=3)
    assert len(data.train) + len(data.test) == 1797
    image = data.train.image(0)
    assert image.dtype == np.uint8
    assert image.shape == (3, 8, 8)
    assert int(data.train.store.pixels.max()) == 255
    shares = data.test.class_counts() / (data.test.class_counts() + data.train.class_counts())
    assert np.allclose(shares, 0.2, atol=0.01)


def test_a_seed_fixes_the_held_out_share() -> None:
    first, same, other = (load_dataset("digits", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.test.labels, same.test.labels)
    assert np.array_equal(first.test.image(7), same.test.image(7))
    assert not np.array_equal(first.test.store.pixels, other.test.store.pixels)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_held_out_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(PartitionError, match="held-out share"):
        load_dataset("digits", held_out=share)


def test_a_folder_with_train_and_test_keeps_them_apart(tmp_path: Path) -> None:
    write_class(tmp_path / "train" / "cat", 3, (255, 0, 0))
    write_class(tmp_path / "train" / "dog", 2, (0, 255, 0))
    write_class(tmp_path / "test" / "dog", 1, (0, 255, 0))
    data = load_dataset(f"folder:{tmp_path}")
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test.labels.tolist() == [1]
    assert data.test.image(0)[:, 0, 0].tolist() == [0, 255, 0]
    assert data.test.image(0).shape == (3, 4, 6)
    noticed = [(entry.path, entry.reason) for entry in data.noticed]
    assert ("cat", "a class without test images") in noticed
    assert data.skipped == ()


def test_a_folder_of_classes_holds_out_a_share_of_each(tmp_path: Path) -> None:
    write_class(tmp_path / "cat", 5)
    write_class(tmp_path / "dog", 10)
    write_class(tmp_path / "one", 1)
    data = load_dataset(f"folder:{tmp_path}", held_out=0.2, seed=1)
    assert data.train.class_counts().tolist() == [4, 8, 1]
    assert data.test.class_counts().tolist() == [1, 2, 0]


def test_unreadable_files_are_skipped_and_named(tmp_path: Path) -> None:
    write_class(tmp_path / "cat", 3)
    (tmp_path / "cat" / "text.png").write_text("no image")
    cut = tmp_path / "cat" / "cut.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(cut)
    cut.write_bytes(cut.read_bytes()[:-500])
    (tmp_path / "cat" / "notes.txt").write_text("notes")
    (tmp_path / "cat" / ".hidden.png").write_text("ignored")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rotten").mkdir()
    (tmp_path / "rotten" / "a.png").write_bytes(b"")
    write_image(tmp_path / "stray.png")
    data = load_dataset(f"folder:{tmp_path}")
    assert data.class_names == ("cat",)
    assert len(data.train) + len(data.test) == 3
    named = {str(Path(entry.path).relative_to(tmp_path)): entry.reason for entry in data.skipped}
    assert set(named) == {
        "cat/text.png",
        "cat/cut.jpg",
        "cat/notes.txt",
        "cat",
        "empty",
        "rotten",
        "rotten/a.png",
        "stray.png",
    }
    assert "truncated" in named["cat/cut.jpg"]
    assert named["cat"] == "1 hidden or machine-made entries skipped: .hidden.png"
    assert named["empty"] == named["rotten"] == "a class without a readable image"


def test_an_image_that_claims_too_many_pixels_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.data.pictures.MAX_PIXELS", 100)
    write_class(tmp_path / "cat", 2)
    huge = write_image(tmp_path / "cat" / "huge.png", size=(11, 10))
    data = load_dataset(f"folder:{tmp_path}")
    assert [entry.path for entry in data.skipped] == [str(huge)]
    assert "11 x 10 pixels" in data.skipped[0].reason


@pytest.mark.parametrize("names", [None, ("cat", "emu")])
def test_test_images_of_an_untrained_class_are_evaluated(
    tmp_path: Path, names: tuple[str, ...] | None
) -> None:
    write_class(tmp_path / "train" / "cat", 2)
    write_class(tmp_path / "val" / "cat", 1)
    write_class(tmp_path / "val" / "emu", 1)
    data = load_dataset(f"folder:{tmp_path}", class_names=names)
    assert data.class_names == ("cat", "emu")
    assert data.train.labels.tolist() == [0, 0]
    assert data.test.labels.tolist() == [0, 1]
    assert data.skipped == ()
    assert ("emu", "a class without training images") in [(n.path, n.reason) for n in data.noticed]


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError) as refused:
        load_dataset(f"folder:{tmp_path / 'nowhere'}")
    assert refused.value.value == str(tmp_path / "nowhere")


def test_an_empty_folder_is_a_clear_error_that_names_what_was_skipped(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match="no readable image"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_text("no image")
    with pytest.raises(EmptyDatasetError, match=r"a\.png"):
        load_dataset(f"folder:{tmp_path}")


def test_an_image_that_rots_after_opening_is_a_typed_error(tmp_path: Path) -> None:
    write_class(tmp_path / "cat", 2)
    data = load_dataset(f"folder:{tmp_path}")
    for path in (tmp_path / "cat").iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(CorruptImageError, match=r"cat/\d\.png"):
        data.train.image(0)


def test_labels_follow_the_runs_class_names(tmp_path: Path) -> None:
    for name in ("ant", "cat", "dog"):
        write_class(tmp_path / "train" / name, 2)
        write_class(tmp_path / "test" / name, 1)
    run = ("dog", "emu", "cat")
    data = load_dataset(f"folder:{tmp_path}", class_names=run)
    assert data.class_names == run
    assert data.train.labels.tolist() == [2, 2, 0, 0]
    assert [data.train.store.paths[i].parent.name for i in (0, 3)] == ["cat", "dog"]
    assert {entry.path for entry in data.skipped} == {"ant"}


def test_a_set_that_shares_no_class_with_the_run_is_refused() -> None:
    with pytest.raises(ClassMismatchError):
        load_dataset("digits", class_names=("cat", "dog"))
    with pytest.raises(ClassMismatchError):
        load_dataset("digits", class_names=("1", "1"))


def test_limits_keep_the_classes_and_are_fixed_by_seed() -> None:
    data = load_dataset("digits")
    small = limit_per_set(data, train=100, test=20, seed=5)
    again = limit_per_set(data, train=100, test=20, seed=5)
    assert (len(small.train), len(small.test)) == (100, 20)
    assert int(small.train.class_counts().min()) >= 9
    assert np.array_equal(small.train.store.pixels, again.train.store.pixels)
    assert limit_per_set(data, train=10**6, seed=5).train is data.train
    with pytest.raises(PartitionError, match="test"):
        limit_per_set(data, test=0, seed=5)


def test_a_dataset_without_training_images_is_refused() -> None:
    data = load_dataset("digits")
    with pytest.raises(EmptyDatasetError):
        Dataset(data.train.subset([]), data.test)


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFPROMPT_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    monkeypatch.delenv("SFPROMPT_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "sfprompt"


@pytest.mark.parametrize("name", ["NoSuchSet", "VOCDetection", "ImageFolder", "cifar10"])
def test_a_set_that_is_not_for_classification_is_unknown(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownDatasetError):
        load_dataset(f"torchvision:{name}:{tmp_path}")


def test_a_missing_torchvision_set_is_an_error_that_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetDownloadError) as refused:
        load_dataset(f"torchvision:GTSRB:{tmp_path}")
    assert str(tmp_path) in str(refused.value)
    assert "folder:PATH" in str(refused.value)
    assert "no network here" in str(refused.value)
