"""Send all samples and their labels, in a run whose labels are shared."""

from __future__ import annotations

import numpy as np

from edge_client.data.image_set import Labels
from edge_client.training.context import Samples
from edge_client.transport.split_client import Ids, SamplesMissing, SplitPlane
from protocol.messages import SAMPLE_ID_BYTES

_MAX_UPLOADS = 3  # of samples that the server has dropped meanwhile


def share_labels(plane: SplitPlane, train: Samples, test: Samples) -> None:
    """Upload the samples that the server lacks, then the labels of all.

    Raises:
        SamplesMissing: the server has no room for the samples.
    """
    for uploads in range(_MAX_UPLOADS + 1):
        labelled = _upload(train), _upload(test)
        try:
            plane.share_labels(*labelled)
            return
        except SamplesMissing as error:
            if uploads == _MAX_UPLOADS:
                raise
            _send_again(error.places, train, test)


def _upload(samples: Samples) -> tuple[Ids, Labels]:
    """Upload the samples of a set; return their ids [n, 16] and labels [n]."""
    if not len(samples):  # a device may have no images of one kind
        ids = np.zeros((0, SAMPLE_ID_BYTES), np.uint8)
        return ids, np.zeros(0, np.int64)
    if samples.uploader is None:
        raise ValueError("labels can be shared only where the server caches samples")
    positions = np.arange(len(samples))
    samples.uploader.ensure(positions)
    labels = samples.images.image_set.labels[positions]
    return samples.uploader.ids(positions), labels


def _send_again(places: list[int], train: Samples, test: Samples) -> None:
    """Upload samples by their places in the training set, followed by the test set."""
    for samples, first in ((train, 0), (test, len(train))):
        chosen = [place - first for place in places if 0 <= place - first < len(samples)]
        if chosen and samples.uploader is not None:
            samples.uploader.send(np.array(chosen, np.int64))
