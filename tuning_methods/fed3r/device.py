"""The device's side of Fed3R: sums over the features of all its samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edge_client.data.image_set import Labels
from edge_client.method import DeviceMethod, RoundResult
from edge_client.torch_model import model_of, read
from edge_client.training import RoundContext
from edge_client.transport.split_client import SplitPlane
from tuning_methods.fed3r.sums import FeatureSums

_BATCH = 128


class Fed3RDevice(DeviceMethod):
    """Computes features with the frozen model; the classifier returns as it came.

    Source: Fed3R (arXiv 2406.01116, section 3).
    """

    def train_round(self, context: RoundContext, plane: SplitPlane) -> RoundResult:
        selected = np.arange(len(context.samples))
        return RoundResult(len(selected), extras=self.update_extras(context, selected))

    @torch.no_grad()
    def update_extras(self, context: RoundContext, selected: Labels) -> dict[str, Tensor]:
        """Return the sums over the selected samples [k], each without augmentation."""
        model, classes = model_of(context), context.run.model.num_classes
        sums: FeatureSums | None = None
        batches = [selected[start : start + _BATCH] for start in range(0, len(selected), _BATCH)]
        for done, positions in enumerate(batches, start=1):
            images, labels = read(context.samples.images, positions)
            features = model.tail.pool(model.head(images))
            sums = sums or FeatureSums(features.shape[1], classes)
            sums.add(features, labels)
            context.advance("sums", done, len(batches))
        return sums.tensors() if sums else {}
