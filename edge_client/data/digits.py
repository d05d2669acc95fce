"""scikit-learn's handwritten digits: 1,797 images of 8×8, in its wheel."""

from __future__ import annotations

import numpy as np
import torch

from edge_client.data.dataset import Dataset, hold_out
from edge_client.data.errors import MissingLibraryError
from edge_client.data.image_set import ArrayStore, ImageSet

_TOP = 16  # the brightest value in scikit-learn's arrays


def load_digits(*, held_out: float, seed: int) -> Dataset:
    """The digits, a share of each class held out for testing.

    Raises MissingLibraryError, PartitionError.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingLibraryError(
            "--data digits", limit="scikit-learn", value=None, hint="pip install scikit-learn"
        ) from error
    raw = datasets.load_digits()
    scaled = np.rint(np.asarray(raw.images) * (255 / _TOP)).astype(np.uint8)  # (1797, 8, 8)
    images = ImageSet(
        ArrayStore(torch.from_numpy(scaled).unsqueeze(1)),
        torch.from_numpy(np.asarray(raw.target, dtype=np.int64)),
        tuple(str(digit) for digit in range(10)),
    )
    return hold_out(images, held_out, seed)
