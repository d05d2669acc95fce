"""Predictions in NumPy: class probabilities, their loss, and counts by class and by confidence."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from protocol.quality import CONFIDENCE_BINS, MAX_CELLS, ConfidenceBin, PredictionCounts

Labels = NDArray[np.int64]

F = TypeVar("F", np.float32, np.float64)


def log_softmax(scores: NDArray[F]) -> NDArray[F]:
    """Return the logarithms of the class probabilities of scores [n, C]."""
    with np.errstate(invalid="ignore"):  # of infinite scores: the caller refuses the loss
        shifted = scores - scores.max(axis=1, keepdims=True)
        result: NDArray[F] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def softmax(scores: NDArray[F]) -> NDArray[F]:
    """Return the class probabilities of scores [n, C]."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        result: NDArray[F] = powers / powers.sum(axis=1, keepdims=True)
    return result


def cross_entropy(scores: NDArray[np.floating], labels: Labels) -> float:
    """Return the mean cross-entropy of scores [n, C] and classes [n], in nats."""
    logs = log_softmax(np.asarray(scores, np.float64))
    return float(-np.mean(logs[np.arange(len(labels)), labels]))


def one_hot(labels: Labels, classes: int) -> NDArray[np.float64]:
    """Return the classes [n] as rows [n, C] with a single 1."""
    return np.eye(classes)[labels]


class PredictionCounter:
    """Adds up the predictions of one evaluation, batch by batch."""

    def __init__(self) -> None:
        self._cells: Counter[tuple[int, int]] = Counter()
        self._samples = np.zeros(CONFIDENCE_BINS, np.int64)
        self._correct = np.zeros(CONFIDENCE_BINS, np.int64)
        self._confidence = np.zeros(CONFIDENCE_BINS, np.float64)
        self._is_finite = True

    def add(self, probabilities: NDArray[Any], labels: NDArray[Any]) -> None:
        """Count a batch.

        Args:
            probabilities: of the classes, [B, C].
            labels: of the images, [B].
        """
        predicted = probabilities.argmax(axis=1)  # [B]
        confidence = probabilities.max(axis=1).astype(np.float64).clip(0.0, 1.0)  # [B]
        self._is_finite = self._is_finite and bool(np.isfinite(confidence).all())
        confidence = np.nan_to_num(confidence)
        self._cells.update(zip(labels.tolist(), predicted.tolist(), strict=True))
        # (i / n, (i + 1) / n] is bin i
        bins = np.clip(np.ceil(confidence * CONFIDENCE_BINS).astype(np.int64) - 1, 0, None)
        np.add.at(self._samples, bins, 1)
        np.add.at(self._correct, bins, predicted == labels)
        np.add.at(self._confidence, bins, confidence)

    def counts(self) -> PredictionCounts | None:
        """Return the counts; None: too many cells for a report, or a model that has diverged."""
        if len(self._cells) > MAX_CELLS or not self._is_finite:
            return None
        figures = zip(self._samples, self._correct, self._confidence, strict=True)
        return PredictionCounts(
            confusion=tuple((*cell, self._cells[cell]) for cell in sorted(self._cells)),
            bins=tuple(
                ConfidenceBin(samples=int(n), correct=int(right), confidence_sum=float(total))
                for n, right, total in figures
            ),
        )
