"""Classify image files with an exported model on this machine, without a server. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from edge_client.data.batches import Preprocessing
from edge_client.model import UNUSABLE, Floats, preprocessing_of
from edge_client.prediction import Classifier, class_labels
from protocol.errors import InvalidField
from split_model.checkpoints.export import load_exported


class WholePredictor(Classifier):
    """Classifies with an exported model on this machine, without a server.

    Args:
        file: file written by ``split-server export``.

    Raises:
        InvalidField: the file is not an exported model.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._model = load_exported(file)
        except UNUSABLE as error:
            raise InvalidField(
                f"the file is not an exported model: {error}",
                field="model",
                value=str(file),
                hint="export one on the server: split-server export RUN --out model.safetensors",
            ) from error

    @property
    def preprocessing(self) -> Preprocessing:
        return preprocessing_of(self._model.settings, self._model.preparation)

    @property
    def labels(self) -> Sequence[str]:
        return class_labels(self._model.class_names, self._model.settings.num_classes)

    @torch.no_grad()
    def probabilities(self, images: Floats, start: int) -> Floats:
        logits: torch.Tensor = self._model(torch.from_numpy(images))
        result: Floats = logits.softmax(dim=1).numpy()
        return result
