"""The sets that the papers measure on, each from tiny files of its own format.

CIFAR-10, CIFAR-100, SVHN and EuroSAT are in test_data_files.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_client.data.errors import DataFormatError, MissingLibraryError
from edge_client.data.sources import load_dataset
from split_model.backbone.libraries import torchvision
from tests.support.data import cut_network


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch)


def write_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve flowers: four to train on, two to validate, six to test."""
    from scipy.io import savemat

    base = root / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for number in range(1, 13):
        Image.new("RGB", (9, 7), (number, 0, 0)).save(base / "jpg" / f"image_{number:05d}.jpg")
    labels = np.array([[1, 1, 102, 102, 5, 5, 1, 1, 1, 102, 102, 7]])
    savemat(base / "imagelabels.mat", {"labels": labels})
    halves = {"trnid": [[1, 3, 2, 4]], "valid": [[5, 6]], "tstid": [[7, 8, 9, 10, 11, 12]]}
    savemat(base / "setid.mat", {name: np.array(ids) for name, ids in halves.items()})
    # torchvision knows the real files by their sums
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *_: True)


def test_flowers_102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flowers(tmp_path, monkeypatch)
    data = load_dataset(f"torchvision:Flowers102:{tmp_path}")
    assert len(data.class_names) == 102
    assert data.class_names[101] == "blackberry lily"
    assert data.train.labels.tolist() == [0, 101, 0, 101]
    assert data.test.labels.tolist() == [0, 0, 0, 101, 101, 6]
    assert data.train.image(1).shape == (3, 7, 9)
    assert abs(int(data.train.image(1)[0, 0, 0]) - 3) <= 2


def test_resisc_45_is_a_folder_of_classes(tmp_path: Path) -> None:
    for kind in ("airplane", "sea_ice"):
        folder = tmp_path / "NWPU-RESISC45" / kind
        folder.mkdir(parents=True)
        for number in range(1, 6):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{kind}_{number:03d}.jpg")
    data = load_dataset(f"folder:{tmp_path / 'NWPU-RESISC45'}", held_out=0.2)
    assert data.class_names == ("airplane", "sea_ice")
    assert data.train.class_counts().tolist() == [4, 4]
    assert data.test.class_counts().tolist() == [1, 1]


def write_pcam(root: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="the extra sets")
    (root / "pcam").mkdir()
    for half, count in (("train", 5), ("test", 3)):
        pixels = np.zeros((count, 96, 96, 3), np.uint8)
        pixels[:, :, :, 1] = np.arange(count).reshape(-1, 1, 1)
        labels = (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
        for name, key, values in (("x", "x", pixels), ("y", "y", labels)):
            path = root / "pcam" / f"camelyonpatch_level_2_split_{half}_{name}.h5"
            with h5py.File(path, "w") as file:
                file[key] = values


def test_pcam(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    data = load_dataset(f"torchvision:PCAM:{tmp_path}")
    assert data.class_names == ("0", "1")
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0]
    assert data.test.labels.tolist() == [0, 1, 0]
    assert data.train.image(3).shape == (3, 96, 96)
    assert data.train.image(3)[:, 0, 0].tolist() == [0, 3, 0]


def test_a_broken_pcam_is_a_typed_error(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    (tmp_path / "pcam" / "camelyonpatch_level_2_split_test_y.h5").write_bytes(b"no labels")
    with pytest.raises(DataFormatError, match="split_test_y"):
        load_dataset(f"torchvision:PCAM:{tmp_path}")


@pytest.mark.skipif(importlib.util.find_spec("h5py") is not None, reason="h5py is installed")
def test_pcam_without_its_library_says_which(tmp_path: Path) -> None:
    with pytest.raises(MissingLibraryError, match="pip install h5py"):
        load_dataset(f"torchvision:PCAM:{tmp_path}")
