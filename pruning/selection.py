"""Selection of the samples with the highest scores, over all samples or within each class."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from protocol.arrays import Array, Backend, SomeArray, backend_of
from protocol.errors import InvalidField, NonFinite, WrongShape

__all__ = ["select_highest", "selected_count"]


def selected_count(samples: int, keep_fraction: float) -> int:
    """Return how many of ``samples`` to select: the nearest integer, halves up, at least 1.

    Of 0 samples it selects 0. It uses the fraction as a decimal number: 0.145 of 100 is 14.5 and
    becomes 15, although the nearest binary number lies below 0.145.

    Raises:
        InvalidField: the fraction is not above 0 and at most 1, or ``samples`` is negative.
    """
    if not 0 < keep_fraction <= 1:
        raise InvalidField(
            "keep_fraction must be above 0 and at most 1",
            field="keep_fraction",
            limit=[0, 1],
            value=keep_fraction,
        )
    if samples < 0:
        raise InvalidField(
            "the number of samples must be at least 0", field="samples", limit=0, value=samples
        )
    exact = Fraction(repr(float(keep_fraction))) * samples
    return min(samples, max(1, math.floor(exact + Fraction(1, 2))))


def select_highest(
    scores: SomeArray,
    keep_fraction: float,
    labels: Array | None = None,
    per_class: bool = False,
) -> SomeArray:
    """Return the indices of the samples with the highest scores, ascending.

    Of equal scores it selects the lower index: equal input gives equal output on every machine.

    Args:
        scores: [N], finite.
        keep_fraction: the share to select, above 0 and at most 1; see `selected_count`.
        labels: the class of each sample, [N], integers; only with ``per_class``.
        per_class: select this share of each class. Each class that occurs has at least one selected
            sample, so that the selected share is larger with many small classes.

    Returns:
        int64 [K], of the scores' library and on their device; empty if N is 0.

    Raises:
        NonFinite: a score is NaN or infinite.
        WrongShape: the shape of scores or labels is not [N].
        InvalidField: the fraction is out of range, or labels are missing or not integers.

    Source: arXiv 2407.17533, section 3.
    """
    if scores.ndim != 1:
        raise WrongShape(
            "scores must have one dimension",
            field="scores",
            limit=["N"],
            value=list(scores.shape),
        )
    backend = backend_of(scores)
    xp, own = backend.xp, backend.own(scores)
    non_finite = len(own) - int(xp.sum(xp.isfinite(own)))
    if non_finite:
        raise NonFinite(
            "scores must be finite",
            field="scores",
            limit=0,
            value=non_finite,
            hint="the model's output is NaN or infinite: lower the learning rate",
        )
    order = xp.argsort(own, descending=True, stable=True)  # [N]
    if not per_class:
        selected = order[: selected_count(len(own), keep_fraction)]
    else:
        selected = _select_within_classes(backend, order, keep_fraction, labels)
    indices: SomeArray = xp.sort(selected)
    return indices


def _select_within_classes(
    backend: Backend, order: Any, keep_fraction: float, labels: Array | None
) -> Any:
    if labels is None:
        raise InvalidField("per_class needs labels", field="labels")
    if labels.shape != order.shape:
        raise WrongShape(
            "labels must have one entry for each score",
            field="labels",
            limit=list(order.shape),
            value=list(labels.shape),
        )
    if not backend_of(labels).xp.isdtype(labels.dtype, "integral"):
        raise InvalidField("labels must be integers", field="labels", value=str(labels.dtype))
    selected_count(0, keep_fraction)  # checks the fraction, also if no class occurs
    xp = backend.xp
    ranked = backend.own(labels)[order]  # [N], classes from the highest score down
    selected = [order[:0]]
    for label in xp.unique_values(ranked):
        of_class = order[ranked == label]
        selected.append(of_class[: selected_count(len(of_class), keep_fraction)])
    return xp.concat(selected)
