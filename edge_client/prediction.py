"""Classify image files with a tuned model: with the server's body, or on this machine alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_client.data.batches import Preprocessing
from edge_client.data.errors import CorruptImageError
from edge_client.data.image_set import decode_file
from edge_client.data.remarks import as_text
from edge_client.model import UNUSABLE, DeviceModel, preprocessing_of
from edge_client.storage.blob_cache import BlobCache
from edge_client.transport.client import Server
from edge_client.transport.split_client import SplitPlane
from protocol.errors import InvalidField, StaleRound
from protocol.messages import JoinRequest, RunView
from split_model.checkpoints.export import load_exported

_BATCH = 32

_MAX_DOWNLOADS = 5  # downloads of newer global states, for one batch


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, or the reason why it cannot be read.

    Attributes:
        path: path of the image.
        classes: name and probability of each class, the most probable first.
        error: the reason; None: the image was classified.
    """

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "classes": dict(self.classes)}


class Classifier(ABC):
    """Classifies image files, batch by batch."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that the model expects."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """The classes' names, or their numbers if they have no names."""

    @abstractmethod
    def probabilities(self, images: torch.Tensor, start: int) -> torch.Tensor:
        """Compute the class probabilities [B, C] of images [B, 3, S, S].

        Args:
            images: preprocessed images, float32 [B, 3, S, S].
            start: number of the first image, for the name of the request.
        """

    @torch.no_grad()
    def predict(self, files: list[Path], top: int) -> Iterator[Prediction]:
        """Yield the ``top`` classes of each file in order, or the error of an unreadable file."""
        preprocessing, labels = self.preprocessing, self.labels
        for start in range(0, len(files), _BATCH):
            chunk = files[start : start + _BATCH]
            images, errors = [], {}
            for path in chunk:
                try:
                    image = decode_file(path, preprocessing.background).unsqueeze(0)
                    images.append(preprocessing.resize(image))  # [1, 3, S, S]
                except CorruptImageError as error:
                    errors[path] = error.hint or str(error)
            rows: Iterator[torch.Tensor] = iter(())
            if images:
                batch = preprocessing.normalise(torch.cat(images))
                rows = iter(self.probabilities(batch, start))
            for path in chunk:
                if path in errors:
                    yield Prediction(as_text(path), error=errors[path])
                    continue
                best = next(rows).topk(min(top, len(labels)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                yield Prediction(as_text(path), tuple((labels[i], value) for i, value in pairs))


class Predictor(Classifier):
    """Classifies with head and tail on this device, and the body on the server.

    Create it with `join`.

    Args:
        server: the split server, authenticated.
        run: the server's current view of the run.
        files: cache of the server's files.
    """

    def __init__(self, server: Server, run: RunView, files: BlobCache) -> None:
        self._server, self._run, self._files = server, run, files
        self._plane = SplitPlane(server, run.plan, run.plan.wire.inference_smashed)
        self._model = _download(server, run, files)

    @classmethod
    def join(
        cls,
        server: Server,
        run: RunView,
        folder: Path,
        key: str,
        name: str,
        join_token: str | None = None,
    ) -> Predictor:
        """Join the run without samples, authenticate the server client, and download the model.

        Args:
            server: the run's server.
            run: the run to join.
            folder: folder of the file cache.
            key: idempotency key; the same key gives the same participant.
            name: the device's name.
            join_token: the server's token, if it requires one.
        """
        classes = run.plan.model.num_classes
        request = JoinRequest(name=name, train_samples=0, test_samples=0, num_classes=classes)
        joined = server.join(run.id, request, key, join_token)
        server.authenticate(joined.credential)
        return cls(server, joined.run, BlobCache(folder))

    @property
    def preprocessing(self) -> Preprocessing:
        return self._model.preprocessing

    @property
    def labels(self) -> Sequence[str]:
        return _class_labels(self._run.settings.class_names, self._run.plan.model.num_classes)

    def probabilities(self, images: torch.Tensor, start: int) -> torch.Tensor:
        for _ in range(_MAX_DOWNLOADS):
            try:
                return self._probabilities(images, start)
            except StaleRound:  # the run has a newer global state
                self._run = self._server.run(self._run.id)
                plan = self._run.plan
                self._plane = SplitPlane(self._server, plan, plan.wire.inference_smashed)
                self._model = _download(self._server, self._run, self._files)
        return self._probabilities(images, start)

    def _probabilities(self, images: torch.Tensor, start: int) -> torch.Tensor:
        model = self._model
        smashed = model.head(images, model.prompts)
        features = smashed if model.is_whole else self._infer(smashed, start)
        logits = model.classify(features)
        return logits.softmax(dim=1)

    def _infer(self, smashed: torch.Tensor, start: int) -> torch.Tensor:
        run, step = self._run, f"predict.{start}"
        return self._plane.infer(smashed, step=step, round_=run.round, state=run.state.sha256)


def _download(server: Server, run: RunView, files: BlobCache) -> DeviceModel:
    head = files.fetch(run.head, lambda start: server.head(run.id, start))
    state = files.fetch(run.state, lambda start: server.state(run.id, run.state, start))
    return DeviceModel.load(run.plan.model, head, state)


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
        return _class_labels(self._model.class_names, self._model.settings.num_classes)

    def probabilities(self, images: torch.Tensor, start: int) -> torch.Tensor:
        logits: torch.Tensor = self._model(images)
        return logits.softmax(dim=1)


def _class_labels(names: Sequence[str] | None, count: int) -> Sequence[str]:
    return names or tuple(map(str, range(count)))
