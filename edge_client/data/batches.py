"""Preprocess, augment and batch images for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_client.data.errors import PreprocessingError
from edge_client.data.image_set import ImageSet, Labels, Pixels
from edge_client.data.pictures import WHITE, Colour
from edge_client.data.sampling import generator
from protocol.parts import Fit

Floats = NDArray[np.float32]

Interpolation = Literal["bilinear", "bicubic", "nearest"]

_MAX_SIDE = 4096  # pixels

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Augmentation:
    """Random horizontal flip, with probability 1/2, and random shift with repeated edges.

    The changes depend on the seed, the epoch and the image's position, not on its batch.

    Attributes:
        max_shift: largest shift in each direction, as a share of the image's side.

    Raises:
        PreprocessingError: ``max_shift`` is out of range.
    """

    seed: int
    flip: bool = True
    max_shift: float = 0.125

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_shift <= 0.5:
            raise PreprocessingError("max_shift", limit="0 to 0.5", value=self.max_shift)

    def apply(self, images: Pixels, positions: Labels, epoch: int) -> Pixels:
        """Augment images.

        Args:
            images: uint8 [b, 3, S, S].
            positions: positions of the images in their set, int64 [b].
            epoch: number of the training epoch.

        Returns:
            Augmented copies, uint8 [b, 3, S, S].
        """
        side = images.shape[-1]
        limit = round(self.max_shift * side)
        pixels = np.arange(side)
        augmented = np.empty_like(images)
        for row, position in enumerate(positions.tolist()):
            rng = generator(self.seed, "augment", epoch, position)
            down, right = rng.integers(-limit, limit + 1, size=2).tolist()
            flipped = self.flip and bool(rng.integers(2))
            rows = np.clip(pixels + down, 0, side - 1)
            columns = np.clip(pixels + right, 0, side - 1)
            if flipped:
                columns = columns[::-1]
            augmented[row] = images[row][:, rows[:, None], columns]
        return augmented


@dataclass(frozen=True)
class Preprocessing:
    """Turns an image into a model's input.

    Attributes:
        image_size: side in pixels.
        mean: mean of R, G and B, on a scale of 0 to 1.
        std: standard deviation of R, G and B, on the same scale.
        fit: how an image that is not square becomes square: crop to its centre, pad or stretch.
        background: colour of the padding, (R, G, B).

    Raises:
        PreprocessingError: a value is out of range.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    fit: Fit = "crop"
    background: Colour = WHITE

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= _MAX_SIDE:
            raise PreprocessingError("image_size", limit=f"1 to {_MAX_SIDE}", value=self.image_size)
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(-1e6 < value < 1e6 for value in values):
                raise PreprocessingError(field, limit="three finite numbers", value=values)
        if min(self.std) <= 0:
            raise PreprocessingError("std", limit="more than 0", value=self.std)
        if self.interpolation not in get_args(Interpolation):
            raise PreprocessingError(
                "interpolation", limit=" | ".join(get_args(Interpolation)), value=self.interpolation
            )
        if self.fit not in get_args(Fit):
            raise PreprocessingError("fit", limit=" | ".join(get_args(Fit)), value=self.fit)

    @property
    def bytes_per_image(self) -> int:
        """Size of one resized image as uint8."""
        return 3 * self.image_size**2

    @property
    def form(self) -> tuple[object, ...]:
        """The settings that `resize` depends on; equal forms give equal pixels."""
        return self.image_size, self.interpolation, self.fit, self.background

    def resize(self, image: Pixels) -> Pixels:
        """Make an image square, and resize it: uint8 [3, H, W] → uint8 [3, S, S].

        Resizing is Pillow's, antialiased except with nearest-neighbour interpolation.
        """
        height, width = image.shape[-2:]
        side = self.image_size
        if self.fit == "stretch":
            return self._interpolate(image, side, side)
        if self.fit == "crop":
            shorter = min(height, width)
            top, left = (height - shorter) // 2, (width - shorter) // 2
            square = image[:, top : top + shorter, left : left + shorter]
            return self._interpolate(square, side, side)
        longer = max(height, width)
        rows = max(1, int(side * height / longer + 0.5))
        columns = max(1, int(side * width / longer + 0.5))
        resized = self._interpolate(image, rows, columns)  # before padding: it bounds the memory
        if rows == columns:
            return resized
        padded = np.empty((3, side, side), np.uint8)
        padded[:] = np.array(self.background, np.uint8)[:, None, None]
        top, left = (side - rows) // 2, (side - columns) // 2
        padded[:, top : top + rows, left : left + columns] = resized
        return padded

    def _interpolate(self, image: Pixels, rows: int, columns: int) -> Pixels:
        if image.shape[-2:] == (rows, columns):
            return image
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        resized = picture.resize((columns, rows), _FILTERS[self.interpolation])
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    def normalise(self, images: Pixels) -> Floats:
        """Normalise each channel by mean and std: uint8 [b, 3, S, S] → float32 [b, 3, S, S]."""
        mean, std = (
            np.array(values, np.float32).reshape(3, 1, 1) * np.float32(255)
            for values in (self.mean, self.std)
        )
        normalised = images.astype(np.float32)
        normalised -= mean
        normalised /= std
        return normalised


def shuffled(n: int, batch_size: int, seed: int, epoch: int = 0) -> list[Labels]:
    """Shuffle 0 … n-1 by seed and epoch, and cut the order into batches, int64 [batch_size].

    The last batch may be smaller.

    Raises:
        PreprocessingError: ``batch_size`` is below 1, or ``n`` or ``epoch`` negative.
    """
    for field, value, minimum in (("n", n, 0), ("batch_size", batch_size, 1), ("epoch", epoch, 0)):
        if value < minimum:
            raise PreprocessingError(field, limit=f"at least {minimum}", value=value)
    order = generator(seed, "shuffle", epoch).permutation(n)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


class BatchReader:
    """Reads batches of one set and caches resized images as uint8.

    The first ``cache_bytes // (3·S·S)`` images of the set are cached; the others are read again
    each time. Augmentation follows resizing, so that it differs in each epoch, cached or not.

    Args:
        image_set: the images and labels.
        preprocessing: preprocessing of the model.
        cache_bytes: memory budget of the cache in bytes; 0: no cache.
        augmentation: augmentation of training batches; None: no augmentation.

    Raises:
        PreprocessingError: ``cache_bytes`` is negative.
    """

    def __init__(
        self,
        image_set: ImageSet,
        preprocessing: Preprocessing,
        *,
        cache_bytes: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        if cache_bytes < 0:
            raise PreprocessingError("cache_bytes", limit="at least 0", value=cache_bytes)
        self.image_set = image_set
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        side = preprocessing.image_size
        count = min(len(image_set), cache_bytes // preprocessing.bytes_per_image)
        self._cache = np.empty((count, 3, side, side), np.uint8)
        self._filled = np.zeros(count, np.bool_)
        for position in range(count):
            resized = image_set.store.take_resized(position, preprocessing.form)
            if resized is not None:
                self._cache[position] = resized
                self._filled[position] = True

    def __len__(self) -> int:
        return len(self.image_set)

    def read(
        self, indices: Sequence[int] | Labels, *, epoch: int | None = None
    ) -> tuple[Floats, Labels]:
        """Read a batch; an image's values do not depend on the other images of the batch.

        Args:
            indices: positions in the set, [b].
            epoch: number of the training epoch, for the augmentation; None: no augmentation.

        Returns:
            Images float32 [b, 3, S, S] and labels int64 [b].

        Raises:
            CorruptImageError: an image cannot be read.
        """
        positions = _positions(indices)
        images = self._resized(positions)
        if self.augmentation is not None and epoch is not None:
            images = self.augmentation.apply(images, positions, epoch)
        return self.preprocessing.normalise(images), self.image_set.labels[positions]

    def _resized(self, positions: Labels) -> Pixels:
        count = len(self._filled)
        if count == 0:
            return _read_resized(self.image_set, positions, self.preprocessing)
        cacheable = positions < count  # [b]
        wanted = np.zeros_like(self._filled)
        wanted[positions[cacheable]] = True
        absent = np.flatnonzero(wanted & ~self._filled)
        if len(absent):
            self._cache[absent] = _read_resized(self.image_set, absent, self.preprocessing)
            self._filled[absent] = True
        if bool(cacheable.all()):
            return self._cache[positions]
        side = self.preprocessing.image_size
        images = np.empty((len(positions), 3, side, side), np.uint8)
        images[cacheable] = self._cache[positions[cacheable]]
        images[~cacheable] = _read_resized(
            self.image_set, positions[~cacheable], self.preprocessing
        )
        return images


def _positions(indices: Sequence[int] | Labels) -> Labels:
    return np.asarray(indices, np.int64).reshape(-1)


def _read_resized(image_set: ImageSet, positions: Labels, preprocessing: Preprocessing) -> Pixels:
    """Read and resize images, uint8 [n, 3, S, S]."""
    side = preprocessing.image_size
    resized = np.empty((len(positions), 3, side, side), np.uint8)
    for row, position in enumerate(positions.tolist()):
        resized[row] = preprocessing.resize(image_set.image(position))
    return resized
