"""File formats of data sets: idx, CIFAR's binary form, torchvision's layouts."""

import gzip
import io
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_client.data import fashion_mnist as fashion
from edge_client.data.errors import (
    CorruptImageError,
    DataFormatError,
    DatasetDownloadError,
    PickledDataError,
)
from edge_client.data.fashion_mnist import read_idx
from edge_client.data.sources import load_dataset
from split_model.backbone.libraries import torchvision
from tests.support.data import cut_network

NAMES = ("train", "t10k")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch)
    monkeypatch.setattr(fashion.shutil, "which", lambda name: None)


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_fashion(folder: Path, *, packed: bool, counts: tuple[int, int] = (12, 5)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in zip(NAMES, counts, strict=True):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = np.repeat(labels * 20, 28 * 28).reshape(count, 28, 28)
        for part, values in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
            raw = idx_bytes(values)
            if packed:
                (folder / f"{prefix}-{part}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / f"{prefix}-{part}").write_bytes(raw)


@pytest.mark.parametrize(
    ("below", "packed"),
    [("FashionMNIST/raw", False), ("usr/share/datasets/fashion-mnist", True), (".", True)],
)
def test_fashion_mnist_is_found_in_each_layout(tmp_path: Path, below: str, packed: bool) -> None:
    write_fashion(tmp_path / below, packed=packed)
    data = load_dataset(f"fashion-mnist:{tmp_path}")
    assert (len(data.train), len(data.test)) == (12, 5)
    assert data.class_names[8] == "Bag"
    assert data.train.labels.tolist() == [*range(10), 0, 1]
    assert data.train.image(3).shape == (3, 28, 28)
    assert (data.train.image(3) == 60).all()


def test_torchvisions_name_for_it_gives_the_same_set(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=True)
    data = load_dataset(f"torchvision:FashionMNIST:{tmp_path}")
    assert len(data.train) == 12


def test_fashion_mnist_that_is_nowhere_names_every_way(tmp_path: Path) -> None:
    with pytest.raises(DatasetDownloadError) as refused:
        load_dataset(f"fashion-mnist:{tmp_path}")
    for word in ("train-images-idx3-ubyte", str(tmp_path), "apt-get", "dpkg -x", "github.com"):
        assert word in str(refused.value)


def test_a_failed_fetch_reports_why_each_way_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(home: Path) -> None:
        raise RuntimeError("no network today")

    monkeypatch.setattr(fashion, "_download_from_debian", fails)
    monkeypatch.setattr(fashion, "_download_by_torchvision", fails)
    with pytest.raises(DatasetDownloadError, match="no network today; no network today"):
        load_dataset(f"fashion-mnist:{tmp_path}")


def test_debians_package_is_unpacked_into_the_root_without_being_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if command[0] == "apt-get":
            (cwd / "dataset-fashion-mnist_0_all.deb").write_bytes(b"")
        else:
            write_fashion(Path(command[-1], "usr/share/datasets/fashion-mnist"), packed=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fashion.shutil, "which", lambda name: name)
    monkeypatch.setattr(fashion.subprocess, "run", run)
    assert len(load_dataset(f"fashion-mnist:{tmp_path}").test) == 5
    assert len(load_dataset(f"fashion-mnist:{tmp_path}").test) == 5
    assert [command[0] for command in commands] == ["apt-get", "dpkg"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["FashionMNIST"]


def test_a_command_that_fails_is_reported_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ls: cannot access"):
        fashion._run(["ls", "/no/such/place"], tmp_path)


def test_images_and_labels_have_to_agree_in_number(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(4, np.uint8)))
    with pytest.raises(DataFormatError, match="one for each image"):
        load_dataset(f"fashion-mnist:{tmp_path}")


def test_a_label_without_a_class_is_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(5, 10, np.uint8)))
    with pytest.raises(DataFormatError, match="labels"):
        load_dataset(f"fashion-mnist:{tmp_path}")


GOOD = idx_bytes(np.arange(6, dtype=np.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        GOOD[:7],
        b"\0\0\x0d\2" + GOOD[4:],  # floats
        b"\0\0\x08\3" + GOOD[4:],  # three dimensions
        GOOD[:-1],
        GOOD + b"x",
        GOOD[:4] + b"\xff" * 8 + GOOD[12:],  # claims 16 EiB
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_file_that_contradicts_its_header_is_refused(
    tmp_path: Path, raw: bytes, packed: bool
) -> None:
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(DataFormatError):
        read_idx(path, 2)


def test_an_idx_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(GOOD)
    assert read_idx(tmp_path / "x", 2).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_broken_gzip_is_a_format_error(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(GOOD)[:-9])
    with pytest.raises(DataFormatError):
        read_idx(tmp_path / "x.gz", 2)


def cifar_files(records: int = 2) -> dict[str, bytes]:
    record = bytes([7]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
    files = {f"data_batch_{i}.bin": record * records for i in range(1, 6)}
    files["test_batch.bin"] = record
    files["batches.meta.txt"] = ("\n".join(f"class {i}" for i in range(10)) + "\n\n").encode()
    return files


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, raw in cifar_files().items():
        (folder / name).write_bytes(raw)


def test_cifar_is_read_in_its_binary_form(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin")
    data = load_dataset(f"torchvision:CIFAR10:{tmp_path}")
    assert (len(data.train), len(data.test)) == (10, 1)
    assert data.train.label(0) == 7
    assert data.class_names[7] == "class 7"
    assert data.train.image(0)[:, 5, 5].tolist() == [1, 2, 3]


def test_cifar_100_takes_the_fine_label(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(bytes([3, 42]) + bytes(3072))
    (folder / "fine_label_names.txt").write_text("\n".join(f"c{i}" for i in range(100)))
    assert load_dataset(f"torchvision:CIFAR100:{tmp_path}").train.label(0) == 42


def tar_of(files: dict[str, bytes], path: Path, *, link: str | None = None) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(raw)
            if name == link:
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(entry, io.BytesIO(raw))


def test_cifars_archive_is_unpacked_where_it_lies(tmp_path: Path) -> None:
    tar_of(cifar_files() | {"../../evil": b"x"}, tmp_path / "cifar-10-binary.tar.gz")
    data = load_dataset(f"torchvision:CIFAR10:{tmp_path}")
    assert len(data.train) == 10
    assert not list(tmp_path.parent.rglob("evil"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
    ]


def test_a_link_or_a_missing_file_in_the_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    tar_of(cifar_files(), archive, link="test_batch.bin")
    with pytest.raises(DataFormatError, match="regular file"):
        load_dataset(f"torchvision:CIFAR10:{tmp_path}")
    tar_of({"test_batch.bin": b""}, archive)
    with pytest.raises(DataFormatError, match="archive"):
        load_dataset(f"torchvision:CIFAR10:{tmp_path}")
    assert not (tmp_path / "cifar-10-batches-bin").exists()


def test_cifars_python_form_is_refused_and_the_binary_form_named(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(PickledDataError, match=r"cifar-10-binary\.tar\.gz"):
        load_dataset(f"torchvision:CIFAR10:{tmp_path}")


def test_cifar_that_is_not_there_names_the_binary_form(tmp_path: Path) -> None:
    with pytest.raises(DatasetDownloadError, match=r"data_batch_1.*no network here"):
        load_dataset(f"torchvision:CIFAR10:{tmp_path}")


def test_a_cut_cifar_file_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"x" * 3072)
    with pytest.raises(DataFormatError, match="multiple of 3073"):
        load_dataset(f"torchvision:CIFAR10:{tmp_path}")


def test_a_set_with_the_train_form_opens_what_is_there(tmp_path: Path) -> None:
    write_fashion(tmp_path / "KMNIST" / "raw", packed=False)
    data = load_dataset(f"torchvision:KMNIST:{tmp_path}")
    assert (len(data.train), len(data.test)) == (12, 5)
    assert data.train.label(3) == 3
    assert data.train.image(3).shape == (3, 28, 28)
    assert data.train.subset([11, 2]).image(1)[0, 0, 0] == 40


@pytest.mark.parametrize("name", ["ImageNet", "LSUN"])
def test_sets_that_rest_on_pickles_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PickledDataError, match="folder:PATH"):
        load_dataset(f"torchvision:{name}:{tmp_path}")


def test_the_pickles_of_older_torchvisions_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path / "KMNIST" / "raw", packed=False)
    (tmp_path / "KMNIST" / "processed").mkdir()
    (tmp_path / "KMNIST" / "processed" / "training.pt").write_bytes(b"")
    with pytest.raises(PickledDataError, match="processed"):
        load_dataset(f"torchvision:KMNIST:{tmp_path}")


def write_eurosat(root: Path) -> None:
    for name in ("Forest", "River"):
        folder = root / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / f"{name}_{i}.jpg")


def test_a_set_without_halves_holds_out_a_share(tmp_path: Path) -> None:
    write_eurosat(tmp_path)
    data = load_dataset(f"torchvision:EuroSAT:{tmp_path}", held_out=0.4)
    assert data.class_names == ("Forest", "River")
    assert data.train.class_counts().tolist() == [3, 3]
    assert data.test.class_counts().tolist() == [2, 2]


def test_a_corrupt_image_of_a_torchvision_set_is_a_typed_error(tmp_path: Path) -> None:
    write_eurosat(tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"rotten")
    data = load_dataset(f"torchvision:EuroSAT:{tmp_path}")
    with pytest.raises(CorruptImageError, match="EuroSAT"):
        data.train.image(0)


def test_a_set_with_the_split_form_opens_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.io import savemat

    for split, count in (("train", 10), ("test", 3)):
        pixels = np.zeros((32, 32, 3, count), np.uint8)
        pixels[:, :, 2] = 9
        labels = (np.arange(count) % 10 + 1).reshape(-1, 1)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    # torchvision knows the real files by their sums
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *_: True)
    data = load_dataset(f"torchvision:SVHN:{tmp_path}")
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert len(data.test) == 3
    assert data.train.image(0)[:, 0, 0].tolist() == [0, 0, 9]


def test_labels_that_do_not_count_from_zero_are_renamed(tmp_path: Path) -> None:
    for split, counts in (("train", (3, 10)), ("val", (10, 4))):
        folder = tmp_path / "clevr" / "CLEVR_v1.0"
        (folder / "scenes").mkdir(parents=True, exist_ok=True)
        (folder / "images" / split).mkdir(parents=True)
        scenes = []
        for i, count in enumerate(counts):
            name = f"{i}.png"
            Image.new("RGB", (4, 4)).save(folder / "images" / split / name)
            scenes.append(f'{{"image_filename": "{name}", "objects": {[0] * count}}}')
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(
            f'{{"scenes": [{", ".join(scenes)}]}}'
        )
    data = load_dataset(f"torchvision:CLEVRClassification:{tmp_path}")
    assert data.class_names == ("3", "4", "10")
    assert sorted(data.train.labels.tolist()) == [0, 2]
    assert sorted(data.test.labels.tolist()) == [1, 2]
