"""The class sums of a participant, against what its samples can give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.errors import InvalidField
from split_server.closed_form.sums import Sums, check_sums

SAMPLES, RANK, CLASSES = 40, 6, 4

LABELS = torch.arange(SAMPLES) % CLASSES

FEATURES = torch.randn(SAMPLES, RANK, generator=torch.Generator().manual_seed(0)) + 0.3


def sums_of(labels: Tensor) -> Sums:
    one_hot = F.one_hot(labels, CLASSES).double()
    return Sums((one_hot.T @ FEATURES.double()).float(), one_hot.sum(dim=0).float())


@pytest.mark.parametrize("seed", range(5))
def test_the_sums_of_any_labels_are_accepted(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    check_sums(sums_of(torch.randint(0, CLASSES, (SAMPLES,), generator=generator)), FEATURES)
    check_sums(sums_of(torch.full((SAMPLES,), seed % CLASSES)), FEATURES)
    furthest = FEATURES[:, 0].argsort(descending=True)
    labels = torch.empty(SAMPLES, dtype=torch.int64)
    labels[furthest] = torch.arange(SAMPLES) // (SAMPLES // CLASSES)
    check_sums(sums_of(labels), FEATURES)


def test_sums_that_no_labels_give_are_refused() -> None:
    sums = sums_of(LABELS)
    for wrong in (
        Sums(sums.features * 20, sums.counts),
        Sums(-sums.features, sums.counts),
        Sums(sums.features + 1e30, sums.counts),
        Sums(torch.zeros_like(sums.features), sums.counts),
    ):
        with pytest.raises(InvalidField, match="add up to the features"):
            check_sums(wrong, FEATURES)


def test_a_class_cannot_reach_further_than_the_samples_that_reach_furthest() -> None:
    """Its length alone would allow it: samples point in many directions."""
    sums = sums_of(LABELS)
    lengths = FEATURES.norm(dim=1).sort(descending=True).values
    shifted = sums.features.clone()
    direction = torch.zeros(RANK)
    direction[0] = float(lengths[: SAMPLES // CLASSES].sum()) - float(shifted[0].norm())
    shifted[0] += direction
    shifted[1] -= direction
    assert float(shifted[0].norm()) <= float(lengths[: SAMPLES // CLASSES].sum())
    with pytest.raises(InvalidField, match="longer than that of any"):
        check_sums(Sums(shifted, sums.counts), FEATURES)


def test_counts_that_are_not_the_number_of_samples_are_refused() -> None:
    sums = sums_of(LABELS)
    for counts in (sums.counts + 1, torch.zeros(CLASSES), sums.counts * 1e6):
        with pytest.raises(InvalidField, match="counts"):
            check_sums(Sums(sums.features, counts), FEATURES)
