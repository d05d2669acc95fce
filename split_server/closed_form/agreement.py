"""Whether a participant's labels agree with those of the others, from sums alone.

Round 0's sums are exact, so a hostile participant can only lie about labels. Its samples of one
class then look like another class of the others: the mean of the samples that it calls c is nearest
to their mean of another class. Means are compared in whitened features, whose covariance the server
knows without labels; the frequency of a class has no effect. Where the others do not have a class,
nothing is said, so that one class on each device stays exact.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from split_server.closed_form.classifier import FeatureSums, RidgeClassifier
from split_server.closed_form.sums import Sums

_STRENGTH = 0.1  # of the whitening's penalty, of the mean variance

_FEWEST_HOLDERS = 2  # other participants that must have a class: of one, either may be wrong

_FEWEST_SAMPLES = 5  # of a class, of the others: means of fewer say little

_FEWEST_CHECKED = 8  # samples of the participant in such classes

_DEVIATIONS = 0.5  # by which another class must be nearer before labels disagree

_FEWEST_PARTICIPANTS = 3  # of which a majority can be told


@dataclass(frozen=True)
class Whitening:
    """A map of features to coordinates of variance 1 or less.

    Attributes:
        mean: [r], float64.
        matrix: [r, r], float64.
        noise: expected squared distance of one sample from its mean.
    """

    mean: Tensor
    matrix: Tensor
    noise: float

    @classmethod
    def of(cls, sums: FeatureSums) -> Whitening:
        """Compute the map from the moments of all samples."""
        values, vectors = torch.linalg.eigh(sums.products / max(1, sums.count))
        values = values.clamp(min=0)
        damped = values + (_STRENGTH * values.mean()).clamp(min=1e-30)
        return cls(sums.mean, vectors / damped.sqrt(), float((values / damped).sum()))

    @classmethod
    def of_solved(cls, classifier: RidgeClassifier, features: Tensor) -> Whitening:
        """Take the map that the ridge regression of round 0 used, for features [n, r]."""
        matrix = classifier.influence * classifier.count**0.5
        whitened = (features.double() - classifier.mean) @ matrix
        return cls(classifier.mean, matrix, float(whitened.square().sum(dim=1).mean()))

    def whiten(self, sums: Sums) -> Tensor:
        """Return class sums [C, r] of whitened features."""
        counts = sums.counts.double()
        return (sums.features.double() - counts[:, None] * self.mean) @ self.matrix


class ClassMeans:
    """The class sums of all participants, in whitened features.

    Args:
        whitening: the map.
        participants: their sums.
    """

    def __init__(self, whitening: Whitening, participants: Collection[Sums]) -> None:
        self._noise = whitening.noise
        self._sums = torch.stack([whitening.whiten(each) for each in participants])  # (P, C, r)
        self._counts = torch.stack([each.counts.double() for each in participants])  # (P, C)

    def __len__(self) -> int:
        return len(self._counts)

    def share(self, place: int, without: Collection[int] = ()) -> tuple[float, float] | None:
        """Return the share of a participant's samples in classes that agree, and their margin.

        Args:
            place: of the participant.
            without: places of others that do not count.

        Returns:
            None: the others do not know its classes.
        """
        others = [each for each in range(len(self)) if each != place and each not in without]
        counts = self._counts[others].sum(dim=0)  # (C)
        holders = (self._counts[others] > 0).sum(dim=0)
        known = (counts >= _FEWEST_SAMPLES) & (holders >= _FEWEST_HOLDERS)
        own = self._counts[place]
        checked = known & (own > 0)
        if float(own[checked].sum()) < _FEWEST_CHECKED or int(known.sum()) < 2:
            return None
        means = self._sums[others].sum(dim=0)[known] / counts[known, None]  # (K, r)
        own_means = self._sums[place][checked] / own[checked, None]  # (k, r)
        distances = torch.cdist(own_means, means).square()  # (k, K)
        distances -= self._noise / counts[known]  # a mean of few samples is off by more
        own_columns = (
            torch.arange(len(known))[known][None] == torch.arange(len(known))[checked, None]
        )
        named = distances[own_columns][:, None]  # (k, 1)
        # The deviation of the difference of two such distances, if each feature has variance 1.
        between = torch.cdist(means[own_columns.double().argmax(dim=1)], means)
        spread = 1 / own[checked, None] + 1 / counts[known] + 1 / counts[checked, None]
        excess = (named - distances) / (2 * between * spread.sqrt()).clamp(min=1e-12)
        excess = excess.masked_fill(own_columns, -torch.inf).max(dim=1).values  # (k)
        weights = own[checked] / own[checked].sum()
        agrees = (excess <= _DEVIATIONS).double()
        return float((weights * agrees).sum()), -float((weights * excess).sum())

    def find_disagreeing(self, least: float) -> dict[int, float]:
        """Find the participants whose labels do not agree with the others'.

        The one that agrees least is left out first, and the others are compared again without it.
        If as many as half would have to be left out, it is unknown who is right, and nobody is.

        Args:
            least: share of a participant's samples that must agree.

        Returns:
            The share that agrees, by place.
        """
        found: dict[int, float] = {}
        while len(self) >= _FEWEST_PARTICIPANTS:
            shares = {
                place: share
                for place in range(len(self))
                if place not in found and (share := self.share(place, found)) is not None
            }
            low = {place: share for place, share in shares.items() if share[0] < least}
            if not low:
                break
            worst = min(low, key=lambda place: (*low[place], place))
            found[worst] = low[worst][0]
            if 2 * len(found) >= len(self):
                return {}
        return found
