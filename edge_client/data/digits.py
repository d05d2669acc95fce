"""Load scikit-learn's handwritten digits: 1,797 images of 8×8 pixels, included in its wheel."""

from __future__ import annotations

import numpy as np

from edge_client.data.dataset import Dataset, hold_out
from edge_client.data.errors import MissingLibraryError
from edge_client.data.image_set import ArrayStore, ImageSet

_MAX_VALUE = 16  # of a pixel in scikit-learn's arrays


def load_digits(*, held_out: float, seed: int) -> Dataset:
    """Load the digits and hold out a share of each class for testing.

    Raises:
        MissingLibraryError: scikit-learn is not installed.
        PartitionError: ``held_out`` is out of range.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingLibraryError(
            "--data digits", limit="scikit-learn", value=None, hint="pip install scikit-learn"
        ) from error
    raw = datasets.load_digits()
    scaled = np.rint(np.asarray(raw.images) * (255 / _MAX_VALUE)).astype(np.uint8)  # [1797, 8, 8]
    images = ImageSet(
        ArrayStore(scaled[:, None]),
        np.asarray(raw.target, dtype=np.int64),
        tuple(str(digit) for digit in range(10)),
    )
    return hold_out(images, held_out, seed)
