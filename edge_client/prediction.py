"""Classify image files with a tuned model: through the server's body, or whole on this machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from edge_client.data import CorruptImageError, Preprocessing
from edge_client.data.decode import decode_file
from edge_client.model import UNUSABLE, DeviceModel, preprocessing_of
from edge_client.storage.blob_cache import BlobCache
from edge_client.transport import Server, SplitPlane
from protocol.errors import InvalidField, NotFound, StaleRound
from protocol.messages import JoinRequest, RunView
from split_model import load_exported

_BATCH = 32

_RENEWALS = 5  # of the state, for one batch


@dataclass(frozen=True)
class Prediction:
    """One image's most probable classes, best first, or why there are none."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "classes": dict(self.classes)}


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The image files among ``paths`` and below the folders among them, sorted.

    Raises:
        NotFound: a path does not exist, or there is no image at all.
    """
    suffixes = set(Image.registered_extensions())
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise NotFound("no such file or folder", field="images", value=str(path))
        if path.is_dir():
            files += sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes)
        else:
            files.append(path)
    if not files:
        raise NotFound("no image file found", field="images", limit=sorted(suffixes)[:12])
    return files


class Classifier(ABC):
    """Files to classes, a batch at a time."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the model's input."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """The classes' names, or their numbers where they have none."""

    @abstractmethod
    def shares(self, images: torch.Tensor, start: int) -> torch.Tensor:
        """Probabilities [B, C] of images [B, 3, S, S], the first of them number ``start``."""

    @torch.no_grad()
    def predict(self, files: list[Path], top: int) -> Iterator[Prediction]:
        """The ``top`` classes of each file, in order; an unreadable file is named and passed."""
        way, labels = self.preprocessing, self.labels
        for start in range(0, len(files), _BATCH):
            chunk = files[start : start + _BATCH]
            images, errors = [], {}
            for path in chunk:
                try:
                    images.append(way.resize(decode_file(path).unsqueeze(0)))  # [1, 3, S, S]
                except CorruptImageError as error:
                    errors[path] = str(error)
            found: Iterator[torch.Tensor] = iter(())
            if images:
                found = iter(self.shares(way.normalise(torch.cat(images)), start))
            for path in chunk:
                if path in errors:
                    yield Prediction(str(path), error=errors[path])
                    continue
                best = next(found).topk(min(top, len(labels)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                yield Prediction(str(path), tuple((labels[i], share) for i, share in pairs))


class Predictor(Classifier):
    """Head and tail on this device, the body on the server.

    Args:
        run: whose newest global state to use.
        folder: for cached files of the server.
    """

    def __init__(self, server: Server, run: RunView, folder: Path) -> None:
        self._server, self._run = server, run
        self._files = BlobCache(folder)

    def join(self, key: str, name: str, join_token: str | None = None) -> None:
        """Get a credential and the model's parts. No data are announced: nothing to train on."""
        classes = self._run.settings.plan.model.num_classes
        request = JoinRequest(name=name, train_samples=0, test_samples=0, num_classes=classes)
        joined = self._server.join(self._run.id, request, key, join_token)
        self._server.authenticate(joined.credential)
        self._take(joined.run)

    def _take(self, run: RunView) -> None:
        """Use the run's state of now."""
        self._run = run
        head = self._files.fetch(run.head, lambda start: self._server.head(run.id, start))
        state = self._files.fetch(
            run.state, lambda start: self._server.state(run.id, run.state, start)
        )
        self._plane = SplitPlane(self._server, run.settings.plan)
        self._model = DeviceModel.load(run.settings.plan.model, head, state)

    @property
    def preprocessing(self) -> Preprocessing:
        return self._model.preprocessing

    @property
    def labels(self) -> Sequence[str]:
        return _named(self._run.settings.class_names, self._run.settings.plan.model.num_classes)

    def shares(self, images: torch.Tensor, start: int) -> torch.Tensor:
        for _ in range(_RENEWALS):
            try:
                return self._shares(images, start)
            except StaleRound:  # a round was closed meanwhile
                self._take(self._server.run(self._run.id))
        return self._shares(images, start)

    def _shares(self, images: torch.Tensor, start: int) -> torch.Tensor:
        model = self._model
        smashed = model.head(images, model.prompts)
        features = smashed if model.is_whole else self._through_the_body(smashed, start)
        logits: torch.Tensor = model.tail(features)
        return logits.softmax(dim=1)

    def _through_the_body(self, smashed: torch.Tensor, start: int) -> torch.Tensor:
        run, step = self._run, f"predict.{start}"
        return self._plane.infer(smashed, step=step, round_=run.round, state=run.state.sha256)


class WholePredictor(Classifier):
    """An exported model, whole on this machine; no server.

    Raises:
        InvalidField: the file is no exported model.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._model = load_exported(file)
        except UNUSABLE as error:
            raise InvalidField(
                f"this is no exported model: {error}",
                field="model",
                value=str(file),
                hint="make one on the server: split-server export RUN --out model.safetensors",
            ) from error

    @property
    def preprocessing(self) -> Preprocessing:
        return preprocessing_of(self._model.settings, self._model.preparation)

    @property
    def labels(self) -> Sequence[str]:
        return _named(self._model.class_names, self._model.settings.num_classes)

    def shares(self, images: torch.Tensor, start: int) -> torch.Tensor:
        logits: torch.Tensor = self._model(images)
        return logits.softmax(dim=1)


def _named(names: Sequence[str] | None, count: int) -> Sequence[str]:
    return names or tuple(map(str, range(count)))
