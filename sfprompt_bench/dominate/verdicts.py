"""Whether the default form is first in a cell, tied, or behind another method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sfprompt_bench.compare.results import Outcome
from sfprompt_bench.dominate.cells import Cell
from sfprompt_bench.methods.base import Reference
from sfprompt_bench.methods.registry import get_method

DEFAULT = "sfprompt"

Word = Literal["first", "tied", "behind"]


@dataclass(frozen=True)
class Score:
    """A method's accuracy in a cell.

    Attributes:
        method: its name.
        accuracies: by seed, 0 to 1.
        test_images: that they are measured on.
        nbytes: of one device in the whole run, evaluation included; None: the method tunes on
            pooled data.
        seconds: of a run, mean over the seeds.
    """

    method: str
    accuracies: Mapping[int, float]
    test_images: int
    nbytes: float | None = None
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies.values())

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; of one seed, that of the share of right images."""
        if len(self.accuracies) > 1:
            return statistics.stdev(self.accuracies.values())
        return math.sqrt(self.mean * (1 - self.mean) / self.test_images)

    @property
    def is_pooled(self) -> bool:
        return isinstance(get_method(self.method), Reference)

    def at(self, seeds: Iterable[int]) -> Score:
        """The score over some of its seeds."""
        return replace(self, accuracies={seed: self.accuracies[seed] for seed in seeds})


@dataclass(frozen=True)
class Verdict:
    """The default form against the best other method of a cell.

    Attributes:
        cell: the cell.
        scores: of all methods with results, in the order of the command.
        failures: an error message for each run that failed.
    """

    cell: Cell
    scores: tuple[Score, ...]
    failures: tuple[str, ...] = ()

    @property
    def default(self) -> Score | None:
        return next((score for score in self.scores if score.method == DEFAULT), None)

    def best(self, *, pooled: bool = True) -> Score | None:
        """The best other method; without ``pooled``, the best other federated method.

        It is the one with the greatest lead over the default form, over the seeds of both.
        """
        others = [score for score in self.comparable if pooled or not score.is_pooled]
        return min(others, key=self.difference, default=None)

    @property
    def comparable(self) -> list[Score]:
        """The other methods that have a seed with the default form."""
        if self.default is None:
            return []
        seeds = self.default.accuracies.keys()
        others = [score for score in self.scores if score.method != DEFAULT]
        return [score for score in others if seeds & score.accuracies.keys()]

    def difference(self, other: Score) -> float:
        """The default form's mean minus another method's, over the seeds that both have."""
        default, other = self._common(other)
        return default.mean - other.mean

    def in_deviations(self, other: Score) -> float:
        """The difference in units of the pooled standard deviation."""
        default, other = self._common(other)
        squares = (default.deviation**2 + other.deviation**2) / 2
        difference = default.mean - other.mean
        if not squares:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / math.sqrt(squares)

    def word(self, other: Score) -> Word:
        """The verdict: within one standard deviation the two are tied."""
        distance = self.in_deviations(other)
        if abs(distance) <= 1:
            return "tied"
        return "first" if distance > 0 else "behind"

    def _common(self, other: Score) -> tuple[Score, Score]:
        if self.default is None:
            raise ValueError(f"{self.cell.name} has no result of {DEFAULT}")
        seeds = sorted(self.default.accuracies.keys() & other.accuracies.keys())
        return self.default.at(seeds), other.at(seeds)


def verdict_of(cell: Cell, outcomes: Sequence[Outcome], test_images: int) -> Verdict:
    """Score a cell's outcomes.

    Another method has the accuracy of its best measured round on the test images, which favours
    it; the default form has that of its final state.
    """
    scores = [_score(outcome, test_images) for outcome in outcomes if outcome.figures]
    failures = [f"{o.method}, {failure}" for o in outcomes for failure in o.failures]
    return Verdict(cell, tuple(score for score in scores if score), tuple(failures))


def _score(outcome: Outcome, test_images: int) -> Score | None:
    figure = "accuracy" if outcome.method == DEFAULT else "best_accuracy"
    accuracies = {
        seed: figures[figure]
        for seed, figures in zip(outcome.seeds, outcome.figures, strict=True)
        if figures[figure] is not None
    }
    if not accuracies:
        return None
    nbytes, seconds = outcome.mean("bytes_total"), outcome.mean("seconds")
    return Score(outcome.method, accuracies, test_images, nbytes, seconds or 0.0)
