"""The sums that a participant sends in round 0, checked against the features that the server has.

The server knows every sample's features, and does not know the classes. It therefore knows exactly
what all class sums add up to, and how long the sum of so many samples can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.codecs.registry import as_decoded
from protocol.errors import InvalidField
from split_server.closed_form.basis import Basis
from split_server.closed_form.sample_features import SampleFeatures

_ROUNDING = 1e-3  # of the features' lengths: sums travel as float32


@dataclass(frozen=True)
class Sums:
    """One participant's sums: of its features in each class [C, r], and their number [C]."""

    features: Tensor
    counts: Tensor


@dataclass(frozen=True)
class SumLimits:
    """What sums over one participant's samples can be.

    Attributes:
        total: the sum of all features, [r], float64.
        longest: the sum of the n greatest lengths, for n from 0 on, [samples + 1], float64.
    """

    total: Tensor
    longest: Tensor

    @classmethod
    def of(cls, basis: Basis, features: SampleFeatures, codec: str) -> SumLimits:
        """Compute the limits from the features as the device decodes them."""
        chunks = [
            as_decoded(basis.project(chunk[:, None]), codec).flatten(1).double()
            for chunk in features.chunks()
        ]
        total = torch.stack([chunk.sum(dim=0) for chunk in chunks]).sum(dim=0)
        lengths = torch.cat([chunk.norm(dim=1) for chunk in chunks]).sort(descending=True).values
        return cls(total, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    def check(self, sums: Sums) -> None:
        """Refuse sums that no labels of these samples give.

        Raises:
            InvalidField: the counts do not add up to the samples; the sums not to their features;
                or a class's sum is longer than the features of so many samples can be.
        """
        samples = len(self.longest) - 1
        if int(sums.counts.sum()) != samples:
            raise InvalidField(
                "the counts of the classes do not add up to the named samples",
                field="counts",
                limit=samples,
                value=int(sums.counts.sum()),
            )
        slack = _ROUNDING * float(self.longest[-1])
        difference = float((sums.features.double().sum(dim=0) - self.total).norm())
        if not difference <= slack:
            raise InvalidField(
                "the sums of the classes do not add up to the features of the named samples",
                field="sums",
                limit=slack,
                value=difference,
            )
        lengths = sums.features.double().norm(dim=1)  # (C)
        limits = self.longest[sums.counts.long()] + slack
        if bool((lengths > limits).any()):
            worst = int((lengths - limits).argmax())
            raise InvalidField(
                "the sum of a class is longer than the features of so many samples",
                field="sums",
                limit=float(limits[worst]),
                value=float(lengths[worst]),
            )
