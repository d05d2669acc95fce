"""Images to the float tensors a model reads, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from edge_client.data.errors import PreprocessingError
from edge_client.data.image_set import ImageSet
from edge_client.data.sampling import generator


@dataclass(frozen=True)
class Augmentation:
    """A horizontal flip of every second image, and a shift whose gap repeats the edge.

    seed, epoch and an image's position fix what happens to it, whatever batch it comes in.
    Raises PreprocessingError.
    """

    seed: int
    flip: bool = True
    max_shift: float = 0.125  # of the image's side, either way

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_shift <= 0.5:
            raise PreprocessingError("max_shift", limit="0 to 0.5", value=self.max_shift)

    def apply(self, images: Tensor, positions: Tensor, epoch: int) -> Tensor:
        """Changed copies: uint8 (b, 3, S, S) at these positions, int64 (b,), → the same shape."""
        side = images.shape[-1]
        reach = round(self.max_shift * side)
        places = torch.arange(side)
        changed = torch.empty_like(images)
        for slot, position in enumerate(positions.tolist()):
            rng = generator(self.seed, "augment", epoch, position)
            down, right = rng.integers(-reach, reach + 1, size=2).tolist()
            mirrored = self.flip and bool(rng.integers(2))
            rows = (places + down).clamp(0, side - 1)
            columns = (places + right).clamp(0, side - 1)
            if mirrored:
                columns = columns.flip(0)
            changed[slot] = images[slot, :, rows][:, :, columns]
        return changed


Interpolation = Literal["bilinear", "bicubic", "nearest"]

_MOST_PIXELS = 4096

_CHUNK_BYTES = 4 * 1024**2  # of full-size images waiting to be resized together


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input. Raises PreprocessingError.

    image_size: pixels a side; mean, std: for each of R, G, B, of values scaled to 0…1.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= _MOST_PIXELS:
            raise PreprocessingError(
                "image_size", limit=f"1 to {_MOST_PIXELS}", value=self.image_size
            )
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(-1e6 < value < 1e6 for value in values):
                raise PreprocessingError(field, limit="three finite numbers", value=values)
        if min(self.std) <= 0:
            raise PreprocessingError("std", limit="more than 0", value=self.std)
        if self.interpolation not in get_args(Interpolation):
            raise PreprocessingError(
                "interpolation", limit=" | ".join(get_args(Interpolation)), value=self.interpolation
            )

    @property
    def bytes_per_image(self) -> int:
        """What one resized image takes as uint8."""
        return 3 * self.image_size**2

    def resize(self, images: Tensor) -> Tensor:
        """Centre square, resized with antialiasing: uint8 (b, 3, H, W) → uint8 (b, 3, S, S)."""
        height, width = images.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = images[..., top : top + side, left : left + side]
        if side == self.image_size:
            return square
        if self.interpolation == "nearest":
            return functional.interpolate(square, self.image_size, mode="nearest-exact")
        return functional.interpolate(
            square, self.image_size, mode=self.interpolation, antialias=True
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, S, S) → float32 (b, 3, S, S), each channel less its mean, by its std."""
        mean = torch.tensor(self.mean).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std).view(1, 3, 1, 1) * 255
        return images.to(torch.float32).sub_(mean).div_(std)


def shuffled(n: int, batch_size: int, seed: int, epoch: int = 0) -> list[Tensor]:
    """0 … n-1 in an order fixed by seed and epoch, cut into batches: int64 (batch_size,) each.

    The last may be smaller. Raises PreprocessingError unless batch_size >= 1 and n, epoch >= 0.
    """
    for field, value, least in (("n", n, 0), ("batch_size", batch_size, 1), ("epoch", epoch, 0)):
        if value < least:
            raise PreprocessingError(field, limit=f"at least {least}", value=value)
    order = torch.from_numpy(generator(seed, "shuffle", epoch).permutation(n))
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


class BatchReader:
    """Reads batches of one set, keeping resized images as uint8 as far as cache_bytes goes.

    The first cache_bytes // (3·S·S) images of the set are resized once and kept; the others are
    read again each time. 0 keeps none. augmentation is applied to training batches after the
    resizing, so that it is new in each epoch, cached or not.
    Raises PreprocessingError if cache_bytes is negative.
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
        slots = min(len(image_set), cache_bytes // preprocessing.bytes_per_image)
        self._cached = torch.empty((slots, 3, side, side), dtype=torch.uint8)
        self._filled = torch.zeros(slots, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.image_set)

    def read(
        self, indices: Sequence[int] | Tensor, *, epoch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images float32 (b, 3, S, S) and labels int64 (b,) at these positions.

        An image's values do not depend on the others it is asked for with.
        epoch: which training epoch this is, for the augmentation; None: not augmented.
        Raises CorruptImageError.
        """
        positions = _positions(indices)
        images = self._resized(positions)
        if self.augmentation is not None and epoch is not None:
            images = self.augmentation.apply(images, positions, epoch)
        return self.preprocessing.normalise(images), self.image_set.labels[positions]

    def _resized(self, positions: Tensor) -> Tensor:
        slots = len(self._filled)
        if slots == 0:
            return _resized(self.image_set, positions, self.preprocessing)
        cacheable = positions < slots  # (b,)
        wanted = torch.zeros_like(self._filled)
        wanted[positions[cacheable]] = True
        absent = torch.nonzero(wanted & ~self._filled).flatten()
        if len(absent):
            self._cached[absent] = _resized(self.image_set, absent, self.preprocessing)
            self._filled[absent] = True
        if bool(cacheable.all()):
            return self._cached[positions]
        side = self.preprocessing.image_size
        images = torch.empty((len(positions), 3, side, side), dtype=torch.uint8)
        images[cacheable] = self._cached[positions[cacheable]]
        images[~cacheable] = _resized(self.image_set, positions[~cacheable], self.preprocessing)
        return images


def _positions(indices: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(indices, dtype=torch.int64).reshape(-1)


def _resized(image_set: ImageSet, positions: Tensor, way: Preprocessing) -> Tensor:
    """uint8 (n, 3, S, S); neighbours of one size are resized together, up to a bound."""
    resized = torch.empty((len(positions), 3, way.image_size, way.image_size), dtype=torch.uint8)
    waiting: list[Tensor] = []
    done = 0
    for position in positions.tolist():
        image = image_set.image(position)
        if waiting and (
            image.shape != waiting[0].shape or len(waiting) * image.numel() >= _CHUNK_BYTES
        ):
            resized[done : done + len(waiting)] = way.resize(torch.stack(waiting))
            done += len(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        resized[done:] = way.resize(torch.stack(waiting))
    return resized
