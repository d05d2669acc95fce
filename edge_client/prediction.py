"""Classify image files with a run's newest model: head and tail here, the body on the server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.data.batches import Preprocessing
from edge_client.data.errors import CorruptImageError
from edge_client.data.image_set import decode_file
from edge_client.data.remarks import as_text
from edge_client.model import Compute, Floats, Model, check_compute, load_model
from edge_client.storage.blob_cache import BlobCache
from edge_client.transport.client import Server
from edge_client.transport.split_client import SplitPlane
from protocol.errors import StaleRound
from protocol.messages import JoinRequest, RunView
from split_model.predictions import softmax

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
    def probabilities(self, images: Floats, start: int) -> Floats:
        """Compute the class probabilities [B, C] of images [B, 3, S, S].

        Args:
            images: preprocessed images, float32 [B, 3, S, S].
            start: number of the first image, for the name of the request.
        """

    def predict(self, files: list[Path], top: int) -> Iterator[Prediction]:
        """Yield the ``top`` classes of each file in order, or the error of an unreadable file."""
        preprocessing, labels = self.preprocessing, self.labels
        for start in range(0, len(files), _BATCH):
            chunk = files[start : start + _BATCH]
            images, errors = [], {}
            for path in chunk:
                try:
                    image = decode_file(path, preprocessing.background)
                    images.append(preprocessing.resize(image))  # [3, S, S]
                except CorruptImageError as error:
                    errors[path] = error.hint or str(error)
            rows: Iterator[Floats] = iter(())
            if images:
                batch = preprocessing.normalise(np.stack(images))
                rows = iter(self.probabilities(batch, start))
            for path in chunk:
                if path in errors:
                    yield Prediction(as_text(path), error=errors[path])
                    continue
                row = next(rows)
                best = np.argsort(-row, kind="stable")[: min(top, len(labels))].tolist()
                yield Prediction(as_text(path), tuple((labels[i], float(row[i])) for i in best))


class Predictor(Classifier):
    """Classifies with head and tail on this device, and the body on the server.

    Create it with `join`.

    Args:
        server: the split server, authenticated.
        run: the server's current view of the run.
        files: cache of the server's files.
        compute: the library that computes.
    """

    def __init__(
        self, server: Server, run: RunView, files: BlobCache, compute: Compute = "auto"
    ) -> None:
        self._server, self._run, self._files = server, run, files
        self._compute: Compute = compute
        self._load()

    @classmethod
    def join(
        cls,
        server: Server,
        run: RunView,
        folder: Path,
        key: str,
        name: str,
        join_token: str | None = None,
        compute: Compute = "auto",
    ) -> Predictor:
        """Join the run without samples, authenticate the server client, and download the model.

        Args:
            server: the run's server.
            run: the run to join.
            folder: folder of the file cache.
            key: idempotency key; the same key gives the same participant.
            name: the device's name.
            join_token: the server's token, if it requires one.
            compute: the library that computes.

        Raises:
            InvalidField: the run needs torch, which is not installed or not allowed.
        """
        check_compute(run, compute)
        classes = run.plan.model.num_classes
        request = JoinRequest(name=name, train_samples=0, test_samples=0, num_classes=classes)
        joined = server.join(run.id, request, key, join_token)
        server.authenticate(joined.credential)
        return cls(server, joined.run, BlobCache(folder), compute)

    @property
    def preprocessing(self) -> Preprocessing:
        return self._model.preprocessing

    @property
    def labels(self) -> Sequence[str]:
        return class_labels(self._run.settings.class_names, self._run.plan.model.num_classes)

    def probabilities(self, images: Floats, start: int) -> Floats:
        for _ in range(_MAX_DOWNLOADS):
            try:
                return self._probabilities(images, start)
            except StaleRound:  # the run has a newer global state
                self._run = self._server.run(self._run.id)
                self._load()
        return self._probabilities(images, start)

    def _probabilities(self, images: Floats, start: int) -> Floats:
        model = self._model
        smashed = model.smashed(images)
        features = smashed if model.is_whole else self._infer(smashed, start)
        return softmax(model.classify(features))

    def _infer(self, smashed: Floats, start: int) -> Floats:
        run, step = self._run, f"predict.{start}"
        return self._plane.infer(smashed, step=step, round_=run.round, state=run.state.sha256)

    def _load(self) -> None:
        server, run = self._server, self._run
        head = self._files.fetch(run.head, lambda start: server.head(run.id, start))
        state = self._files.fetch(run.state, lambda start: server.state(run.id, run.state, start))
        self._model: Model = load_model(run, head, state, self._compute)
        shape = self._model.feature_shape(run.plan.wire.pooled_features)
        self._plane = SplitPlane(server, run.plan, shape, run.plan.wire.inference_smashed)


def class_labels(names: Sequence[str] | None, count: int) -> Sequence[str]:
    """Return the names of the classes; without names, their numbers."""
    return names or tuple(map(str, range(count)))
