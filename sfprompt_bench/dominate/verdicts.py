"""Whether the default form is first in a cell, tied, or behind another method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
        mean: over the seeds, 0 to 1.
        deviation: over the seeds; of one seed, that of the share of right test images.
        seeds: number of seeds.
        nbytes: of one device in the whole run, evaluation included; None: the method tunes on
            pooled data.
        seconds: of a run, mean over the seeds.
    """

    method: str
    mean: float
    deviation: float
    seeds: int
    nbytes: float | None
    seconds: float

    @property
    def is_pooled(self) -> bool:
        return isinstance(get_method(self.method), Reference)


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
        """The best other method; without ``pooled``, the best other federated method."""
        others = [s for s in self.scores if s.method != DEFAULT and (pooled or not s.is_pooled)]
        return max(others, key=lambda score: score.mean, default=None)

    def difference(self, other: Score) -> float:
        """The default form's mean minus another method's."""
        return self.default.mean - other.mean if self.default else math.nan

    def in_deviations(self, other: Score) -> float:
        """The difference in units of the pooled standard deviation."""
        if self.default is None:
            return math.nan
        squares = (self.default.deviation**2 + other.deviation**2) / 2
        difference = self.difference(other)
        if not squares:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / math.sqrt(squares)

    def word(self, other: Score) -> Word:
        """The verdict: within one standard deviation the two are tied."""
        distance = self.in_deviations(other)
        if abs(distance) <= 1:
            return "tied"
        return "first" if distance > 0 else "behind"


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
    mean, deviation = outcome.mean(figure), outcome.spread(figure)
    if mean is None or deviation is None:
        return None
    if len(outcome.seeds) == 1:
        deviation = math.sqrt(mean * (1 - mean) / test_images)
    return Score(
        outcome.method,
        mean,
        deviation,
        len(outcome.seeds),
        outcome.mean("bytes_total"),
        outcome.mean("seconds") or 0.0,
    )
