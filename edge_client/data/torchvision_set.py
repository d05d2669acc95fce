"""Load any classification set of `torchvision.datasets` by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_client.data.cifar import FORMS as CIFAR_FORMS
from edge_client.data.cifar import load_cifar
from edge_client.data.dataset import Dataset, hold_out
from edge_client.data.download import cache_dir
from edge_client.data.errors import (
    CorruptImageError,
    DataFormatError,
    DatasetDownloadError,
    EmptyDatasetError,
    MissingLibraryError,
    PickledDataError,
    UnknownDatasetError,
)
from edge_client.data.fashion_mnist import load_fashion_mnist
from edge_client.data.groups import no_groups_error
from edge_client.data.image_set import ImageSet, ImageStore, Labels, Pixels, channels_first
from edge_client.data.pictures import (
    WHITE,
    Colour,
    convert_picture,
    known_formats_only,
    read_picture,
)
from edge_client.data.remarks import Remark

Arguments = Mapping[str, object]

# Arguments for the training and the test half of sets that do not use train=True/False or
# split="train"/"test". None: the set has no test half, so a share of each class is held out.
_HALVES: dict[str, tuple[Arguments, Arguments | None]] = {
    "CLEVRClassification": ({"split": "train"}, {"split": "val"}),
    "Caltech101": ({}, None),
    "Caltech256": ({}, None),
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "EuroSAT": ({}, None),
    "FGVCAircraft": ({"split": "trainval"}, {"split": "test"}),
    "FakeData": ({}, None),
    "INaturalist": ({"version": "2021_train_mini"}, {"version": "2021_valid"}),
    "Imagenette": ({"split": "train"}, {"split": "val"}),
    "Omniglot": ({}, None),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "Places365": ({"split": "train-standard", "small": True}, {"split": "val", "small": True}),
    "SEMEION": ({}, None),
    "SUN397": ({}, None),
}

# Sets whose target is not one class: boxes, masks, flows, captions, pairs, attributes, videos.
# fmt: off
_OTHER_TASKS = frozenset({
    "CREStereo", "CarlaStereo", "CelebA", "Cityscapes", "CocoCaptions", "CocoDetection",
    "ETH3DStereo", "FallingThingsStereo", "Flickr30k", "Flickr8k", "FlyingChairs",
    "FlyingThings3D", "HD1K", "HMDB51", "InStereo2k", "Kinetics", "Kitti", "Kitti2012Stereo",
    "Kitti2015Stereo", "KittiFlow", "LFWPairs", "Middlebury2014Stereo", "MovingMNIST",
    "PhotoTour", "SBDataset", "SBU", "SceneFlowStereo", "Sintel", "SintelStereo", "UCF101",
    "VOCDetection", "VOCSegmentation", "VisionDataset", "WIDERFace",
})

# fmt: on
_PICKLED = {
    "ImageNet": "its meta.bin is a pickle: point folder:PATH at the folder with train/ and val/",
    "LSUN": "its cache is a pickle: point folder:PATH at a folder of images by class",
    "LSUNClass": "its cache is a pickle: point folder:PATH at a folder of images by class",
}

_FOLDERS = frozenset({"ImageFolder", "DatasetFolder"})

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")

_PAIR_ATTRIBUTES = ("_samples", "samples", "_flat_character_images")


def load_torchvision(
    name: str, root: Path | None, *, held_out: float, seed: int, background: Colour = WHITE
) -> Dataset:
    """Load a set of torchvision.datasets; missing files are downloaded.

    Sets with pickled files are refused. CIFAR is read in its binary form.

    Args:
        name: name of the class in torchvision.datasets.
        root: folder of the files; None: the cache.
        held_out: share of each class held out for testing, if the set has no test half.
        seed: seed of the choice of held-out images.
        background: colour behind transparent parts, (R, G, B).

    Raises:
        UnknownDatasetError: torchvision has no such classification set.
        DatasetDownloadError: the files are missing and their download failed.
        PickledDataError: the set's files are pickled.
        MissingLibraryError: the set needs another library.
        EmptyDatasetError: the set has no images.
        DataFormatError: a file is damaged.
    """
    home = root or cache_dir() / "torchvision"
    if name == "FashionMNIST":
        return load_fashion_mnist(root)
    if name in CIFAR_FORMS:
        return load_cifar(name, home)
    if name in _PICKLED:
        raise PickledDataError(
            f"torchvision:{name}", limit="no pickle", value=name, hint=_PICKLED[name]
        )
    factory = _factory(name)
    halves = _halves(name, factory)
    train = _open(name, factory, halves[0], home)
    if halves[1] is None:
        (images,) = _image_sets(name, [train], background)
        return hold_out(images, held_out, seed)
    test = _open(name, factory, halves[1], home)
    return Dataset(*_image_sets(name, [train, test], background))


def _factory(name: str) -> Any:
    from split_model.backbone.libraries import torchvision

    known = [entry for entry in torchvision.datasets.__all__ if entry[:1].isupper()]
    if name in _FOLDERS:
        raise UnknownDatasetError("--data", limit="folder:PATH", value=f"torchvision:{name}")
    if name not in known or name in _OTHER_TASKS:
        alike = [entry for entry in known if entry.lower() == name.lower()]
        offered = sorted(set(known) - _OTHER_TASKS - _FOLDERS - _PICKLED.keys())
        raise UnknownDatasetError(
            "torchvision set",
            limit="a classification set: " + " ".join(offered),
            value=name,
            hint=f"Did you mean {alike[0]}?" if alike and alike[0] != name else "",
        )
    return getattr(torchvision.datasets, name)


def _halves(name: str, factory: Any) -> tuple[Arguments, Arguments | None]:
    if name in _HALVES:
        return _HALVES[name]
    accepted = inspect.signature(factory).parameters
    if "train" in accepted:
        return {"train": True}, {"train": False}
    if "split" in accepted:
        return {"split": "train"}, {"split": "test"}
    return {}, None


def _open(name: str, factory: Any, half: Arguments, home: Path) -> Any:
    """Open one half from disk, or else download it."""
    accepted = inspect.signature(factory).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    rooted: dict[str, object] = {"root": str(home)} if "root" in accepted else {}
    can_download = "download" in accepted or takes_any
    _refuse_old_pickles(name, home)
    try:
        return factory(**rooted, **half, **({"download": False} if can_download else {}))
    except ImportError as error:
        raise MissingLibraryError(f"torchvision:{name}", limit=str(error), value=None) from error
    except Exception as error:  # sets report missing files with different exceptions
        if "pip install" in str(error) or "not installed" in str(error):
            raise MissingLibraryError(
                f"torchvision:{name}", limit=str(error), value=None
            ) from error
        if not can_download:
            raise _download_error(name, home, half, error) from error
    try:
        home.mkdir(parents=True, exist_ok=True)
        return factory(**rooted, **half, download=True)
    except Exception as error:  # as above, and the errors of a download
        raise _download_error(name, home, half, error) from error


def _refuse_old_pickles(name: str, home: Path) -> None:
    """Refuse .pt files of older torchvision versions: they are pickles, which it would read."""
    old = sorted((home / name / "processed").glob("*.pt"))
    if old:
        raise PickledDataError(
            f"torchvision:{name}",
            limit=f"the idx files in {home / name / 'raw'}",
            value=str(old[0]),
            hint=f"Remove {home / name / 'processed'}.",
        )


def _download_error(
    name: str, home: Path, half: Arguments, error: Exception
) -> DatasetDownloadError:
    arguments = ", ".join(f"{key}={value}" for key, value in half.items()) or "the whole set"
    return DatasetDownloadError(
        f"torchvision:{name}",
        limit=f"the files of torchvision.datasets.{name} ({arguments}) below {home}",
        value=f"{type(error).__name__}: {error}",
        hint=(
            f"Arrange them as https://docs.pytorch.org/vision/stable/datasets.html says for {name}"
            f", give another folder with torchvision:{name}:ROOT, or give the images by class as "
            "folder:PATH."
        ),
    )


def _image_sets(name: str, halves: Sequence[Any], background: Colour) -> list[ImageSet]:
    raw = [_labels(name, half) for half in halves]
    names = _class_names(halves[0])
    values = np.unique(np.concatenate(raw))
    if len(values) == 0:
        raise EmptyDatasetError(f"torchvision:{name}", limit="at least one image", value=0)
    if values[0] < 0:
        raise DataFormatError(f"labels of {name}", limit="at least 0", value=int(values[0]))
    if values[-1] >= len(names):  # without names, or labels do not start at 0
        names = tuple(str(value) for value in values)
        raw = [np.searchsorted(values, labels).astype(np.int64) for labels in raw]
    return [
        ImageSet(TorchvisionStore(name, half, background), labels, names)
        for half, labels in zip(halves, raw, strict=True)
    ]


def _class_names(half: Any) -> tuple[str, ...]:
    names = getattr(half, "classes", None) or getattr(half, "categories", None) or ()
    plain = tuple(
        entry if isinstance(entry, str) else ", ".join(map(str, entry)) for entry in names
    )
    return plain if len(set(plain)) == len(plain) else ()


def _labels(name: str, half: Any) -> NDArray[np.int64]:
    """Return each image's class, int64 [n]; images are decoded only if the set has no list."""
    for attribute in _LABEL_ATTRIBUTES:
        labels = _as_labels(getattr(half, attribute, None), len(half))
        if labels is not None:
            return labels
    for attribute in _PAIR_ATTRIBUTES:
        pairs = getattr(half, attribute, None)
        if isinstance(pairs, list) and pairs and isinstance(pairs[0], (tuple, list)):
            labels = _as_labels([pair[-1] for pair in pairs], len(half))
            if labels is not None:
                return labels
    if hasattr(half, "h5py"):
        return _pcam_labels(half)
    # Only the samples themselves contain the labels.
    with known_formats_only():
        labels = _as_labels([half[i][1] for i in range(len(half))], len(half))
    if labels is None:
        raise UnknownDatasetError("torchvision set", limit="one class for each image", value=name)
    return labels


def _as_labels(values: Any, count: int) -> NDArray[np.int64] | None:
    if values is None:
        return None
    try:
        labels = np.asarray(values)
    except ValueError:
        return None
    if labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
        return None
    return labels.astype(np.int64)


def _pcam_labels(half: Any) -> NDArray[np.int64]:
    """Read PCAM's labels from their separate file, int64 [n].

    Raises:
        DataFormatError: the file is damaged.
    """
    file = half._base_folder / half._FILES[half._split]["targets"][0]
    try:
        with half.h5py.File(file) as opened:
            return np.asarray(opened["y"]).astype(np.int64).reshape(-1)
    except (OSError, KeyError) as error:
        raise DataFormatError(
            str(file), limit="an HDF5 file with the array y", value="unreadable", hint=str(error)
        ) from error


class TorchvisionStore(ImageStore):
    """Images of a torchvision set.

    Args:
        name: name of the set.
        half: torchvision's training or test half.
        background: colour behind transparent parts, (R, G, B).
        rows: positions of the images in ``half``, int64 [n]; None: all.
    """

    def __init__(
        self, name: str, half: Any, background: Colour = WHITE, rows: Labels | None = None
    ) -> None:
        self.name = name
        self.half = half
        self._background = background
        if hasattr(half, "loader"):  # a folder of files, which torchvision would decode differently
            half.loader = partial(_open_file, background)
        self.rows = np.arange(len(half)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Pixels:
        """Read one image, uint8 [3, H, W].

        Raises:
            CorruptImageError: the image cannot be decoded.
        """
        row = int(self.rows[index])
        try:
            with known_formats_only():
                image = self.half[row][0]
            if isinstance(image, Image.Image):
                return channels_first(convert_picture(image, self._background))
            return _rgb(np.asarray(image))
        except Exception as error:  # as in decode_file
            raise CorruptImageError(
                f"torchvision:{self.name}",
                limit="a readable image",
                value=f"image {row}",
                hint=str(error),
            ) from error

    def unreadable(self) -> dict[int, Remark]:
        """Return the images that cannot be read now, by position."""
        unreadable = {}
        for index in range(len(self)):
            try:
                self.read(index)
            except CorruptImageError as error:
                reason = error.hint or "unreadable"
                unreadable[index] = Remark(f"{error.field}: {error.value}", reason)
        return unreadable

    def take(self, indices: Labels) -> TorchvisionStore:
        """Return a store of these images only; its files or arrays are shared."""
        return TorchvisionStore(self.name, self.half, self._background, self.rows[indices])

    def groups(self) -> tuple[str, ...]:
        """Raise PartitionError: torchvision's sets have no groups."""
        raise no_groups_error(f"torchvision:{self.name}")


def _open_file(background: Colour, path: str) -> Image.Image:
    return Image.fromarray(read_picture(Path(path), background).pixels)


def _rgb(pixels: NDArray[Any]) -> Pixels:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"{pixels.dtype} {tuple(pixels.shape)} is not a uint8 image")
    # [H, W] or [1, H, W] grey, or [3, H, W]
    return np.broadcast_to(pixels, (3, *pixels.shape[-2:]))
