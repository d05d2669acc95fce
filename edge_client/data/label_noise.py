"""Local differential privacy of labels: the device replaces labels at random before it trains.

This is randomised response: a change of one label changes the probability of anything that the
device sends by a factor of at most e^epsilon. An image gets the same label in every run, since
independent draws would reveal more with each run.

Sources: Warner, 1965; Ghazi et al., arXiv 2102.06062.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ImageSet

_DRAW_BYTES = 8  # each of the two draws


def replacement_rate(epsilon: float, classes: int) -> float:
    """Return the probability with which a label is replaced by a uniformly drawn class.

    The drawn class may be the label itself. A label is sent unchanged with probability
    e^epsilon / (e^epsilon + C - 1), any other class with 1 / (e^epsilon + C - 1).

    Args:
        epsilon: privacy parameter, above 0.
        classes: number of classes C.
    """
    # Unlike e^epsilon, e^-epsilon does not overflow.
    shrunk = math.exp(-epsilon)
    return classes * shrunk / (1 + (classes - 1) * shrunk)


def with_noised_labels(data: Dataset, epsilon: float, secret: bytes) -> Dataset:
    """Return the data with training labels that are epsilon-differentially private.

    Args:
        data: the device's data; the labels of the test images do not change.
        epsilon: privacy parameter, above 0.
        secret: the device's secret, the seed of the draws; it must not leave the device.
    """
    return replace(data, train=_noised(data.train, epsilon, secret))


def _noised(images: ImageSet, epsilon: float, secret: bytes) -> ImageSet:
    classes = len(images.class_names)
    rate = replacement_rate(epsilon, classes)
    purpose = f"labels {epsilon!r} {classes}".encode()
    labels = images.labels.copy()
    for index in range(len(images)):
        uniform, drawn = _draws(secret, purpose, images.store.digest(index))
        if uniform < rate:
            labels[index] = drawn % classes
    return replace(images, labels=labels)


def _draws(secret: bytes, purpose: bytes, image: bytes) -> tuple[float, int]:
    """Return a number from [0, 1) and an integer, both uniform, for one image."""
    digest = hashlib.blake2b(key=secret, digest_size=2 * _DRAW_BYTES)
    digest.update(len(purpose).to_bytes(4, "little") + purpose + image)
    first, second = digest.digest()[:_DRAW_BYTES], digest.digest()[_DRAW_BYTES:]
    return int.from_bytes(first, "little") / 2**64, int.from_bytes(second, "little")
