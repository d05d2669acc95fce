"""Scores of samples by their value for training, from one forward pass of head and tail.

All scores have the type `Score`; `SCORES` lists them by the names in a run's settings. A higher
score marks a more valuable sample. No score needs the body, the network or a backward pass. NumPy
arrays and torch tensors give the same scores, each computed with the library of the logits.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from protocol.arrays import NUMPY, Array, Backend, Generator, SomeArray, backend_of, backend_on
from protocol.errors import InvalidField, WrongShape
from protocol.wire import FLOAT32_BYTES

__all__ = [
    "SCORES",
    "Score",
    "draw_random_scores",
    "el2n",
    "grand",
    "loss",
    "margin",
    "random",
]


class Score(Protocol):
    """The type of all scores: a function that scores N samples.

    Args:
        logits: the tail's output, [N, C], any floating-point dtype; half precision is computed in
            float32.
        labels: the true classes, [N], integers from 0 to C - 1.
        features: the classifier's input, [N, F]; only for `grand`.
        generator: the source of random numbers; only for `random`.

    Returns:
        [N], of the logits' library and on their device, without gradient. The score of a sample
        with non-finite logits is not finite; `select_highest` refuses it.

    Raises:
        WrongShape: the shapes do not fit each other.
        InvalidField: a label is not a class, a dtype is wrong, or an argument is missing.
    """

    def __call__(
        self,
        logits: SomeArray,
        labels: Array,
        features: Array | None = None,
        generator: Generator | None = None,
    ) -> SomeArray: ...


def el2n(
    logits: SomeArray,
    labels: Array,
    features: Array | None = None,
    generator: Generator | None = None,
) -> SomeArray:
    """Return the norm of the error, ‖softmax(logits) − onehot(labels)‖₂, from 0 to √2.

    Arguments and errors: see `Score`.

    Source: EL2N, arXiv 2107.07075, section 2; used by SFPrompt, arXiv 2407.17533, section 3.
    """
    backend, own, classes = _validate(logits, labels)
    with np.errstate(all="ignore"):
        error = _compute_error(backend, own, classes)
        norms: SomeArray = backend.xp.sqrt(backend.xp.sum(error**2, axis=1))  # [N]
    return norms


def grand(
    logits: SomeArray,
    labels: Array,
    features: Array | None = None,
    generator: Generator | None = None,
) -> SomeArray:
    """Return the norm of the loss's gradient with respect to the classifier's weight and bias.

    With the error e = softmax(logits) − onehot(labels) and the classifier's input f, the gradient
    of the cross-entropy is the outer product e fᵀ for the weight and e for the bias; its norm is
    ‖e‖₂ · √(‖f‖₂² + 1). Arguments and errors: see `Score`.

    Source: GraNd, arXiv 2107.07075, section 2, restricted to the last layer.
    """
    error_norm: Any = el2n(logits, labels)  # [N]
    if features is None:
        raise InvalidField("the score grand needs the classifier's input", field="features")
    if features.ndim != 2 or features.shape[0] != logits.shape[0]:
        raise WrongShape(
            "features must have one row for each sample",
            field="features",
            limit=[logits.shape[0], "F"],
            value=list(features.shape),
        )
    backend = backend_of(error_norm)
    own = backend.xp.astype(backend.own(features), error_norm.dtype)
    norms: SomeArray = error_norm * backend.xp.sqrt(backend.xp.sum(own**2, axis=1) + 1)
    return norms


def margin(
    logits: SomeArray,
    labels: Array,
    features: Array | None = None,
    generator: Generator | None = None,
) -> SomeArray:
    """Return the highest logit of another class minus the true class's; above 0 if misclassified.

    These are the negative log-odds of the true class against the strongest other class. Unlike a
    difference of probabilities, they do not saturate: confident samples still have an order.
    Arguments and errors: see `Score`; at least two classes.
    """
    backend, own, classes = _validate(logits, labels)
    if logits.shape[1] < 2:
        raise WrongShape(
            "the score margin needs at least two classes",
            field="logits",
            limit=2,
            value=logits.shape[1],
        )
    others = backend.xp.asarray(own, copy=True)
    others[_true_entries(backend, own, classes)] = -np.inf
    with np.errstate(all="ignore"):
        margins: SomeArray = backend.xp.max(others, axis=1) - _true_logit(backend, own, classes)
    return margins


def loss(
    logits: SomeArray,
    labels: Array,
    features: Array | None = None,
    generator: Generator | None = None,
) -> SomeArray:
    """Return the cross-entropy of each sample, in nats. Arguments and errors: see `Score`."""
    backend, own, classes = _validate(logits, labels)
    xp = backend.xp
    with np.errstate(all="ignore"):
        highest = xp.max(own, axis=1, keepdims=True)
        partition = xp.log(xp.sum(xp.exp(own - highest), axis=1))
        losses: SomeArray = partition - (_true_logit(backend, own, classes) - highest[:, 0])
    return losses  # [N]


def random(
    logits: SomeArray,
    labels: Array,
    features: Array | None = None,
    generator: Generator | None = None,
) -> SomeArray:
    """Return uniform numbers from 0 to 1, the baseline of the other scores.

    They depend only on the generator and on N. Arguments and errors: see `Score`.
    """
    backend, own, _ = _validate(logits, labels)
    if generator is None:
        raise InvalidField("the score random needs a seeded generator", field="generator")
    scores: SomeArray = backend.own(draw_random_scores(len(own), generator))
    return scores


def draw_random_scores(samples: int, generator: Generator) -> Any:
    """Return the scores of `random`, [samples], without computing logits.

    They are of the generator's library, and on its device.
    """
    if isinstance(generator, np.random.Generator):
        return NUMPY.draw([samples], generator)
    return backend_on(generator.device).draw([samples], generator)


SCORES: dict[str, Score] = {
    "el2n": el2n,
    "grand": grand,
    "margin": margin,
    "loss": loss,
    "random": random,
}


def _compute_error(backend: Backend, logits: Any, labels: Any) -> Any:
    """Return softmax(logits) − onehot(labels), [N, C].

    The true class's entry is minus the sum of the others: p − 1 would cancel all digits of a
    confident sample, so that different samples would tie.
    """
    xp = backend.xp
    powers = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))  # [N, C]
    error = powers / xp.sum(powers, axis=1, keepdims=True)
    entries = _true_entries(backend, logits, labels)
    error[entries] = 0.0
    error[entries] = -xp.sum(error, axis=1)
    return error


def _true_entries(backend: Backend, logits: Any, labels: Any) -> tuple[Any, Any]:
    """Return the indices of each sample's true class in the logits."""
    xp = backend.xp
    return xp.arange(len(logits), dtype=xp.int64, device=logits.device), labels


def _true_logit(backend: Backend, logits: Any, labels: Any) -> Any:
    return logits[_true_entries(backend, logits, labels)]


def _validate(logits: Array, labels: Array) -> tuple[Backend, Any, Any]:
    """Check logits and labels; return logits in at least float32 and labels as int64."""
    backend, of_labels = backend_of(logits), backend_of(labels)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise WrongShape(
            "logits must have one row for each sample and one column for each class",
            field="logits",
            limit=["N", "C"],
            value=list(logits.shape),
        )
    if not backend.xp.isdtype(logits.dtype, "real floating"):
        raise InvalidField("logits must be floating-point", field="logits", value=str(logits.dtype))
    if labels.shape != logits.shape[:1]:
        raise WrongShape(
            "labels must have one entry for each sample",
            field="labels",
            limit=[logits.shape[0]],
            value=list(labels.shape),
        )
    if not of_labels.xp.isdtype(labels.dtype, "integral"):
        raise InvalidField("labels must be integers", field="labels", value=str(labels.dtype))
    classes = logits.shape[1]
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise InvalidField(
            "a label is not the number of a class",
            field="labels",
            limit=[0, classes - 1],
            value=[int(labels.min()), int(labels.max())],
        )
    xp, own = backend.xp, backend.own(logits)
    if own.dtype.itemsize < FLOAT32_BYTES:
        own = xp.astype(own, xp.float32)
    return backend, own, xp.astype(backend.own(labels), xp.int64)
