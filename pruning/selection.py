"""Which samples stay: the highest scores, of all or of each class."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from protocol.errors import InvalidField, NonFinite, WrongShape

__all__ = ["select_highest", "selected_count"]


def selected_count(samples: int, keep_fraction: float) -> int:
    """How many of ``samples`` are kept: the nearest whole number, halves upwards, at least 1.

    Of no samples none is kept. The fraction is taken as it is written: 0.145 of 100 is 14.5 and
    therefore 15, although the nearest binary number to 0.145 lies below it.

    Raises:
        InvalidField: the fraction is not above 0 and at most 1, or ``samples`` is negative.
    """
    if not 0 < keep_fraction <= 1:
        raise InvalidField(
            "the kept share is above 0 and at most 1",
            field="keep_fraction",
            limit=[0, 1],
            value=keep_fraction,
        )
    if samples < 0:
        raise InvalidField(
            "a number of samples is at least 0", field="samples", limit=0, value=samples
        )
    exact = Fraction(repr(float(keep_fraction))) * samples
    return min(samples, max(1, math.floor(exact + Fraction(1, 2))))


def select_highest(
    scores: Tensor,
    keep_fraction: float,
    labels: Tensor | None = None,
    per_class: bool = False,
) -> Tensor:
    """The indices of the samples with the highest scores, ascending.

    The pruning step of SFPrompt (arXiv 2407.17533, section 3). Of equal scores the lower index is
    kept, so that equal input gives equal output on every machine.

    Args:
        scores: (n,), finite.
        keep_fraction: the kept share, above 0 and at most 1; see `selected_count`.
        labels: the class of each sample, (n,), whole numbers; needed with ``per_class``.
        per_class: keep this share of every class instead of the whole. Every class that occurs
            keeps at least one sample, so that many small classes keep more than the share.

    Returns:
        (k,) int64, on the scores' device; empty if n is 0.

    Raises:
        NonFinite: a score is NaN or infinite.
        WrongShape: scores or labels are not (n,).
        InvalidField: a fraction out of range, labels missing or not whole numbers.
    """
    if scores.ndim != 1:
        raise WrongShape(
            "there is one score for each sample",
            field="scores",
            limit=["n"],
            value=list(scores.shape),
        )
    broken = int(scores.numel() - scores.isfinite().sum())
    if broken:
        raise NonFinite(
            "some scores are not finite",
            field="scores",
            limit=0,
            value=broken,
            hint="the model's output is NaN or infinite: lower the learning rate",
        )
    order = torch.argsort(scores.detach(), descending=True, stable=True)  # (n,)
    if not per_class:
        kept = order[: selected_count(scores.numel(), keep_fraction)]
    else:
        kept = _highest_of_each_class(order, keep_fraction, labels)
    return kept.sort().values


def _highest_of_each_class(order: Tensor, keep_fraction: float, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise InvalidField("a share of every class needs the labels", field="labels")
    if labels.shape != order.shape:
        raise WrongShape(
            "there is one label for each score",
            field="labels",
            limit=list(order.shape),
            value=list(labels.shape),
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidField("labels are whole numbers", field="labels", value=str(labels.dtype))
    selected_count(0, keep_fraction)  # a wrong fraction is refused, also where no class occurs
    ranked = labels.to(order.device)[order]  # (n,), classes from the highest score down
    kept = order[:0]
    for label in ranked.unique():
        of_class = order[ranked == label]
        kept = torch.cat([kept, of_class[: selected_count(of_class.numel(), keep_fraction)]])
    return kept
