"""Softmax and cross-entropy in NumPy."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

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
