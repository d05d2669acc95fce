"""The sums that a participant sends, checked against the features that the server has.

The server knows every sample's features, and does not know the classes. It therefore knows exactly
what all class sums add up to, and how far the sum of so many samples can reach in any direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import InvalidField

_ROUNDING = 1e-3  # of the features' lengths: sums travel as float32


@dataclass(frozen=True)
class Sums:
    """One participant's sums: of its features in each class [C, r], and their number [C]."""

    features: Tensor
    counts: Tensor

    def is_equal(self, other: Sums) -> bool:
        """Whether both are the same, bit for bit."""
        return torch.equal(self.features, other.features) and torch.equal(self.counts, other.counts)


def check_sums(sums: Sums, features: Tensor) -> None:
    """Refuse sums that no labels of a participant's samples give.

    A class's sum of k samples reaches no further, in its own direction, than the k samples that
    reach furthest in this direction.

    Args:
        sums: as sent; the counts are whole numbers from 0.
        features: of the samples, as the device has decoded them, [n, r].

    Raises:
        InvalidField: the counts do not add up to the samples; the sums not to their features;
            or a class's sum is longer than that of any so many samples.
    """
    samples, values = len(features), features.double()
    if int(sums.counts.sum()) != samples:
        raise InvalidField(
            "the counts of the classes do not add up to the named samples",
            field="counts",
            limit=samples,
            value=int(sums.counts.sum()),
        )
    class_sums = sums.features.double()
    slack = _ROUNDING * float(values.norm(dim=1).sum())
    difference = float((class_sums.sum(dim=0) - values.sum(dim=0)).norm())
    if not difference <= slack:
        raise InvalidField(
            "the sums of the classes do not add up to the features of the named samples",
            field="sums",
            limit=slack,
            value=difference,
        )
    lengths = class_sums.norm(dim=1)  # (C)
    directions = class_sums / lengths.clamp(min=1e-300)[:, None]
    reached = (values @ directions.T).sort(dim=0, descending=True).values.cumsum(dim=0)  # (n, C)
    reached = torch.cat([reached.new_zeros(1, len(lengths)), reached])
    limits = reached.gather(0, sums.counts.long()[None])[0] + slack
    if bool((lengths > limits).any()):
        worst = int((lengths - limits).argmax())
        raise InvalidField(
            "the sum of a class is longer than that of any so many samples",
            field="sums",
            limit=float(limits[worst]),
            value=float(lengths[worst]),
        )
