"""The class sums of a participant, against what its samples can give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.errors import InvalidField
from split_server.closed_form.basis import Basis
from split_server.closed_form.sample_features import SampleFeatures
from split_server.closed_form.sums import SumLimits, Sums

SAMPLES, NUMBERS, RANK, CLASSES = 40, 12, 6, 4

LABELS = torch.arange(SAMPLES) % CLASSES


@pytest.fixture
def features(tmp_path: Path) -> SampleFeatures:
    place = SampleFeatures(tmp_path / "p0001", SAMPLES, NUMBERS)
    place.write(0, torch.randn(SAMPLES, NUMBERS, generator=torch.Generator().manual_seed(0)))
    return place


BASIS = Basis(
    torch.ones(NUMBERS), torch.randn(NUMBERS, RANK, generator=torch.Generator().manual_seed(1)),
    torch.ones(RANK),
)  # fmt: skip


def values(features: SampleFeatures) -> Tensor:
    return torch.cat([BASIS.project(chunk[:, None]) for chunk in features.chunks()]).flatten(1)


def honest(features: SampleFeatures) -> Sums:
    one_hot = F.one_hot(LABELS, CLASSES).double()
    return Sums((one_hot.T @ values(features).double()).float(), one_hot.sum(dim=0).float())


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_the_sums_of_any_labels_are_accepted(features: SampleFeatures, codec: str) -> None:
    limits = SumLimits.of(BASIS, features, "float32")
    limits.check(honest(features))
    whole = values(features).sum(dim=0)
    one_class = Sums(torch.stack([whole, *[torch.zeros(RANK)] * 3]), torch.tensor([40.0, 0, 0, 0]))
    limits.check(one_class)
    SumLimits.of(BASIS, features, codec)


def test_sums_that_no_labels_give_are_refused(features: SampleFeatures) -> None:
    limits, sums = SumLimits.of(BASIS, features, "float32"), honest(features)
    for wrong in (
        Sums(sums.features * 20, sums.counts),
        Sums(-sums.features, sums.counts),
        Sums(sums.features + 1e30, sums.counts),
        Sums(torch.zeros_like(sums.features), sums.counts),
    ):
        with pytest.raises(InvalidField, match="add up to the features"):
            limits.check(wrong)
    shifted = sums.features.clone()
    shifted[0] += 1000.0
    shifted[1] -= 1000.0
    with pytest.raises(InvalidField, match="longer than the features"):
        limits.check(Sums(shifted, sums.counts))


def test_counts_that_are_not_the_number_of_samples_are_refused(features: SampleFeatures) -> None:
    limits, sums = SumLimits.of(BASIS, features, "float32"), honest(features)
    for counts in (sums.counts + 1, torch.zeros(CLASSES), sums.counts * 1e6):
        with pytest.raises(InvalidField, match="counts"):
            limits.check(Sums(sums.features, counts))
