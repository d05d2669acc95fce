"""An order of the samples that tells nothing of their classes."""

from __future__ import annotations

import hashlib

import torch

from edge_client.data.dataset import Dataset
from edge_client.data.errors import CorruptImageError
from edge_client.data.image_set import ImageSet


def by_content(dataset: Dataset) -> Dataset:
    """Both sets in the order of a hash of each image.

    Class folders are read class by class, and a server sees in which order samples are sent: from
    neighbours it could tell which have one label. This order is the same for the same images, so
    that a seed still fixes a run, and means nothing to whoever does not have them.
    """
    return Dataset(_ordered(dataset.train), _ordered(dataset.test))


def _ordered(images: ImageSet) -> ImageSet:
    digests = [_digest(images, position) for position in range(len(images))]
    order = sorted(range(len(images)), key=lambda position: (digests[position], position))
    return images.subset(torch.tensor(order, dtype=torch.int64))


def _digest(images: ImageSet, position: int) -> bytes:
    try:
        image = images.image(position)  # uint8 [3, H, W]
    except CorruptImageError:
        return b""  # whoever reads it later says so
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()
