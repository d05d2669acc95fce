"""Load Fashion-MNIST: 70,000 grey images of 28×28 pixels, from disk or downloaded."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from edge_client.data.dataset import Dataset
from edge_client.data.download import cache_dir
from edge_client.data.errors import DataFormatError, DatasetDownloadError
from edge_client.data.image_set import ArrayStore, ImageSet

_UNSIGNED_BYTE = 0x08  # the idx format's code for uint8

_MAX_BYTES = 4 * 1024**3

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

DEBIAN_PACKAGE = "dataset-fashion-mnist"

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

_RAW = Path("FashionMNIST", "raw")  # torchvision's folder below its root

_DOWNLOAD_TIMEOUT_S = 600


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes as uint8, in the shape that its header declares.

    Args:
        path: path of the file, plain or .gz.
        dimensions: expected number of dimensions.

    Raises:
        DataFormatError: the header is wrong, declares more than 4 GiB, or does not match the size
            of the file.
    """
    try:
        with _open(path) as stream:
            return _read_idx(stream, path, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFormatError(
            "idx file", limit="a readable file", value=str(path), hint=str(error)
        ) from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _read_idx(stream: BinaryIO, path: Path, dimensions: int) -> NDArray[np.uint8]:
    header_bytes = 4 + 4 * dimensions
    header = stream.read(header_bytes)
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if len(header) != header_bytes or header[:4] != magic:
        raise DataFormatError(
            f"header of {path}", limit=f"begins with {magic.hex()}", value=header[:4].hex()
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    if size > _MAX_BYTES:
        raise DataFormatError(f"size of {path}", limit=f"at most {_MAX_BYTES}", value=size)
    if path.suffix != ".gz" and path.stat().st_size != header_bytes + size:
        raise DataFormatError(
            f"size of {path}", limit=header_bytes + size, value=path.stat().st_size
        )
    values = np.empty(size, np.uint8)
    view, filled = values.data, 0
    while filled < size:
        count = cast(int, stream.readinto(view[filled:]))  # type: ignore[attr-defined]
        if not count:
            raise DataFormatError(f"values in {path}", limit=size, value=filled)
        filled += count
    if stream.read(1):
        raise DataFormatError(f"values in {path}", limit=size, value=f"more than {size}")
    return values.reshape(shape)


def load_fashion_mnist(root: Path | None) -> Dataset:
    """Load 60,000 training and 10,000 test images.

    Missing files are downloaded to ``root`` (or the cache), as Debian's package or by torchvision.

    Args:
        root: a folder with the four idx files (plain or .gz), torchvision's root, or the unpacked
            Debian package; None: the cache, and the folder where Debian installs the package.

    Raises:
        DatasetDownloadError: the files are missing and their download failed.
        DataFormatError: a file is damaged.
    """
    home = root or cache_dir() / "fashion-mnist"
    folder = _find(home, system=root is None)
    if folder is None:
        folder = _download(home)
    return Dataset(_read(folder, "train"), _read(folder, "t10k"))


def _find(home: Path, *, system: bool) -> Path | None:
    folders = [home / _RAW, home, home / SYSTEM_FOLDER.relative_to("/")]
    if system:
        folders.append(SYSTEM_FOLDER)
    return next((folder for folder in folders if _is_complete(folder)), None)


def _is_complete(folder: Path) -> bool:
    return all(_file(folder, name) is not None for name in _FILES)


def _file(folder: Path, name: str) -> Path | None:
    plain = folder / name
    compressed = folder / f"{name}.gz"
    return plain if plain.is_file() else compressed if compressed.is_file() else None


def _read(folder: Path, prefix: str) -> ImageSet:
    pixels = read_idx(_file(folder, f"{prefix}-images-idx3-ubyte") or folder, 3)  # [n, H, W]
    labels = read_idx(_file(folder, f"{prefix}-labels-idx1-ubyte") or folder, 1)  # [n]
    if len(pixels) != len(labels):
        raise DataFormatError(
            f"{prefix} labels in {folder}",
            limit=f"{len(pixels)}, one for each image",
            value=len(labels),
        )
    return ImageSet(ArrayStore(pixels[:, None]), labels.astype(np.int64), CLASSES)


def _download(home: Path) -> Path:
    target = home / _RAW
    sources: tuple[Callable[[Path], None], ...] = (_download_from_debian, _download_by_torchvision)
    failures: list[str] = []
    for download in sources:
        try:
            download(home)
        except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
            failures.append(str(error).strip())
        else:
            if _is_complete(target):
                return target
    raise DatasetDownloadError(
        "Fashion-MNIST",
        limit=f"{', '.join(_FILES)} (plain or .gz) in {target}, in {home}, or in {SYSTEM_FOLDER}",
        value="; ".join(failures) or "files are missing",
        hint=(
            f"Do one of these: apt-get install {DEBIAN_PACKAGE}; apt-get download "
            f"{DEBIAN_PACKAGE} && dpkg -x {DEBIAN_PACKAGE}_*.deb {home}; copy the four files of "
            f"https://github.com/zalandoresearch/fashion-mnist to {target}"
        ),
    )


def _download_from_debian(home: Path) -> None:
    """Download and unpack Debian's package. Unlike an installation, this needs no root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise RuntimeError("Debian's package: this machine has no apt-get or no dpkg")
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as name:
        folder = Path(name)
        # As root, apt would download as a user without write permission for this folder.
        as_caller = ["-o", "APT::Sandbox::User=root"]
        _run(["apt-get", *as_caller, "download", "--quiet", DEBIAN_PACKAGE], folder)
        packages = sorted(folder.glob(f"{DEBIAN_PACKAGE}_*.deb"))
        if not packages:
            raise RuntimeError("Debian's package: apt-get left no file")
        _run(["dpkg", "-x", str(packages[-1]), str(folder / "unpacked")], folder)
        unpacked = folder / "unpacked" / SYSTEM_FOLDER.relative_to("/")
        if not _is_complete(unpacked):
            raise RuntimeError("Debian's package: it does not contain the four files")
        target = home / _RAW
        target.mkdir(parents=True, exist_ok=True)
        for part in _FILES:
            source = _file(unpacked, part) or unpacked
            os.replace(source, target / source.name)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(  # noqa: S603 - constant words and this module's paths
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_DOWNLOAD_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"{command[0]}: {lines[-1] if lines else f'exit {done.returncode}'}")


def _download_by_torchvision(home: Path) -> None:
    from split_model.backbone.libraries import torchvision

    try:
        torchvision.datasets.FashionMNIST(str(home), download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"torchvision: {error}") from error
