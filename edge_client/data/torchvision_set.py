"""Any classification set of `torchvision.datasets`, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edge_client.data.cifar import FORMS as CIFAR_FORMS
from edge_client.data.cifar import load_cifar
from edge_client.data.dataset import Dataset, hold_out
from edge_client.data.decode import rgb_tensor
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
from edge_client.data.image_set import ImageSet, Skipped, no_groups

Arguments = Mapping[str, object]

# How a set names its two halves, where that is not train=True/False or split="train"/"test".
# None: there is no test half, and a share of each class is held out.
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


def load_torchvision(name: str, root: Path | None, *, held_out: float, seed: int) -> Dataset:
    """A set of torchvision.datasets with its own halves, or with a share of each class held out.

    root: where its files lie or are fetched to; None: the cache. Fetched only if not there. Sets
    whose files are pickled are refused, but for CIFAR, which is read in its binary form.
    Raises UnknownDatasetError, DatasetDownloadError, PickledDataError, MissingLibraryError,
    EmptyDatasetError, DataFormatError.
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
        (images,) = _image_sets(name, [train])
        return hold_out(images, held_out, seed)
    test = _open(name, factory, halves[1], home)
    return Dataset(*_image_sets(name, [train, test]))


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
    """Open one half: as it lies there, else fetched."""
    accepted = inspect.signature(factory).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    rooted: dict[str, object] = {"root": str(home)} if "root" in accepted else {}
    fetches = "download" in accepted or takes_any
    _refuse_old_pickles(name, home)
    try:
        return factory(**rooted, **half, **({"download": False} if fetches else {}))
    except ImportError as error:
        raise MissingLibraryError(f"torchvision:{name}", limit=str(error), value=None) from error
    except Exception as error:  # each set reports absent files in its own way
        if "pip install" in str(error) or "not installed" in str(error):
            raise MissingLibraryError(
                f"torchvision:{name}", limit=str(error), value=None
            ) from error
        if not fetches:
            raise _not_there(name, home, half, error) from error
    try:
        home.mkdir(parents=True, exist_ok=True)
        return factory(**rooted, **half, download=True)
    except Exception as error:  # as above, and whatever a download can raise
        raise _not_there(name, home, half, error) from error


def _refuse_old_pickles(name: str, home: Path) -> None:
    """torchvision prefers the .pt files of its older versions, which are pickles."""
    old = sorted((home / name / "processed").glob("*.pt"))
    if old:
        raise PickledDataError(
            f"torchvision:{name}",
            limit=f"the idx files in {home / name / 'raw'}",
            value=str(old[0]),
            hint=f"Remove {home / name / 'processed'}.",
        )


def _not_there(name: str, home: Path, half: Arguments, error: Exception) -> DatasetDownloadError:
    wanted = ", ".join(f"{key}={value}" for key, value in half.items()) or "the whole set"
    return DatasetDownloadError(
        f"torchvision:{name}",
        limit=f"the files of torchvision.datasets.{name} ({wanted}) below {home}",
        value=f"{type(error).__name__}: {error}",
        hint=(
            f"Lay them out as https://docs.pytorch.org/vision/stable/datasets.html says for {name}"
            f", name another folder with torchvision:{name}:ROOT, or give the images by class as "
            "folder:PATH."
        ),
    )


def _image_sets(name: str, halves: Sequence[Any]) -> list[ImageSet]:
    raw = [_labels(name, half) for half in halves]
    names = _class_names(halves[0])
    values = np.unique(np.concatenate(raw))
    if len(values) == 0:
        raise EmptyDatasetError(f"torchvision:{name}", limit="at least one image", value=0)
    if values[0] < 0:
        raise DataFormatError(f"labels of {name}", limit="0 and up", value=int(values[0]))
    if values[-1] >= len(names):  # no list of names, or labels that do not count from 0
        names = tuple(str(value) for value in values)
        raw = [np.searchsorted(values, labels).astype(np.int64) for labels in raw]
    return [
        ImageSet(TorchvisionStore(name, half), torch.from_numpy(labels), names)
        for half, labels in zip(halves, raw, strict=True)
    ]


def _class_names(half: Any) -> tuple[str, ...]:
    names = getattr(half, "classes", None) or getattr(half, "categories", None) or ()
    plain = tuple(
        entry if isinstance(entry, str) else ", ".join(map(str, entry)) for entry in names
    )
    return plain if len(set(plain)) == len(plain) else ()


def _labels(name: str, half: Any) -> NDArray[np.int64]:
    """The class of every image, without decoding any where the set keeps a list: int64 (n,)."""
    for attribute in _LABEL_ATTRIBUTES:
        found = _as_labels(getattr(half, attribute, None), len(half))
        if found is not None:
            return found
    for attribute in _PAIR_ATTRIBUTES:
        pairs = getattr(half, attribute, None)
        if isinstance(pairs, list) and pairs and isinstance(pairs[0], (tuple, list)):
            found = _as_labels([pair[-1] for pair in pairs], len(half))
            if found is not None:
                return found
    if hasattr(half, "h5py"):
        return _pcam_labels(half)
    # Nothing but the samples themselves knows.
    found = _as_labels([half[i][1] for i in range(len(half))], len(half))
    if found is None:
        raise UnknownDatasetError("torchvision set", limit="one class for each image", value=name)
    return found


def _as_labels(found: Any, count: int) -> NDArray[np.int64] | None:
    if found is None:
        return None
    try:
        labels = np.asarray(found)
    except ValueError:
        return None
    if labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
        return None
    return labels.astype(np.int64)


def _pcam_labels(half: Any) -> NDArray[np.int64]:
    """PCAM keeps its labels in a file of their own: int64 (n,). Raises DataFormatError."""
    file = half._base_folder / half._FILES[half._split]["targets"][0]
    try:
        with half.h5py.File(file) as opened:
            return np.asarray(opened["y"]).astype(np.int64).reshape(-1)
    except (OSError, KeyError) as error:
        raise DataFormatError(
            str(file), limit="an HDF5 file with the array y", value="another", hint=str(error)
        ) from error


class TorchvisionStore:
    """The images of a torchvision set, read through it; rows: the chosen ones, int64 (n,)."""

    def __init__(self, name: str, half: Any, rows: Tensor | None = None) -> None:
        self.name = name
        self.half = half
        self.rows = torch.arange(len(half)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Tensor:
        """One image: uint8 (3, H, W). Raises CorruptImageError."""
        row = int(self.rows[index])
        try:
            image = self.half[row][0]
            if isinstance(image, Image.Image):
                return rgb_tensor(image)
            return _rgb(torch.as_tensor(image))
        except Exception as error:  # any decoder, any bytes, as in decode_file
            raise CorruptImageError(
                f"torchvision:{self.name}",
                limit="a readable image",
                value=f"image {row}",
                hint=str(error),
            ) from error

    def unreadable(self) -> dict[int, Skipped]:
        """Those whose files are gone or damaged by now."""
        lost = {}
        for index in range(len(self)):
            try:
                self.read(index)
            except CorruptImageError as error:
                lost[index] = Skipped(f"{error.field}: {error.value}", error.hint or "unreadable")
        return lost

    def take(self, indices: Tensor) -> TorchvisionStore:
        """A store of these images alone; the files or arrays behind it are shared."""
        return TorchvisionStore(self.name, self.half, self.rows[indices])

    def groups(self) -> tuple[str, ...]:
        """Raises PartitionError: torchvision tells of none."""
        raise no_groups(f"torchvision:{self.name}")


def _rgb(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"{pixels.dtype} {tuple(pixels.shape)} is no uint8 image")
    return pixels.expand(3, *pixels.shape[-2:])  # (H, W) or (1, H, W) grey, (3, H, W) as it is
