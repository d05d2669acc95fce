"""Compare the updates of a run with a closed-form start with what the server computes itself.

An update of round 0 is the server's own classifier times a factor. A later one is a step of
logistic regression, which needs the labels only as the sums of the features of each class: the
server has these since round 0. It does not know one number: the decay, the strength of the
penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.codec_names import parse_codec
from split_server.closed_form.known import KnownSamples
from split_server.closed_form.result import Solved
from split_server.closed_form.sums import Sums
from split_server.storage.run_files import TAIL_BIAS, TAIL_WEIGHT

MIN_FACTOR, MAX_FACTOR = 1.0, 10**1.5  # of the logits in round 0

_MIN_DECAY_SHARE = 0.1  # of the ridge regression's decay, in later rounds

_CURVATURE = 2.0  # the inverse of the bound 1/2 on the curvature of cross-entropy in a logit

# Error of the updates' codec, as a share of the update's norm. Codecs that are not listed use error
# feedback, so that an update may contain residuals of earlier rounds.
_CODEC_ERRORS = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.03, "int8": 0.1, "int4": 0.4}

_OTHER_ERROR = 10.0

_NEGLIGIBLE = 1e-3  # share of the state's norm: a difference below it is never refused

_MAX_STEPS = 20  # of a round; more are not computed again

_GRID, _REFINEMENTS = 9, 16

_GOLDEN = (math.sqrt(5) - 1) / 2

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The distance from an update to the nearest one that an honest device can send, and its limit.

    Both are L2 norms.
    """

    norm: float
    limit: float

    @property
    def is_refused(self) -> bool:
        """Whether no honest device sends this update."""
        return not self.norm <= self.limit


def logit_factor(update: State, solved: Solved) -> float:
    """Return the factor in an update of round 0, within its limits.

    It is the one whose multiple of the classifier is nearest to the update.
    """
    weight, bias = solved.classifier.weight.double(), solved.classifier.bias.double()
    along = (update[TAIL_WEIGHT].double() * weight).sum() + (update[TAIL_BIAS] * bias).sum()
    squared_norm = weight.square().sum() + bias.square().sum()
    factor = float(along / squared_norm.clamp(min=1e-300))
    return min(max(factor, MIN_FACTOR), MAX_FACTOR) if math.isfinite(factor) else MIN_FACTOR


def measure_start(update: State, solved: Solved, codec: str) -> Difference:
    """Measure how far an update of round 0 is from the nearest multiple of the classifier."""
    factor = logit_factor(update, solved)
    expected = _flat(factor * solved.classifier.weight, factor * solved.classifier.bias)
    sent = _flat(update[TAIL_WEIGHT], update[TAIL_BIAS])
    return Difference(float((sent - expected).norm()), _limit(codec, expected, expected))


def scaled_classifier(solved: Solved, updates: Sequence[tuple[State, int]]) -> dict[str, Tensor]:
    """Return the tail after round 0: the classifier times the median of the devices' factors.

    Args:
        solved: of round 0.
        updates: with the number of samples of each, its weight.
    """
    factors = sorted((logit_factor(update, solved), samples) for update, samples in updates)
    half, seen = sum(samples for _, samples in factors) / 2, 0
    factor = factors[-1][0]
    for each, samples in factors:
        seen += samples
        if seen >= half:
            factor = each
            break
    return {
        TAIL_WEIGHT: factor * solved.classifier.weight,
        TAIL_BIAS: factor * solved.classifier.bias,
    }


def measure_step(
    update: State, state: State, known: KnownSamples, solved: Solved, *, steps: int, codec: str
) -> Difference | None:
    """Measure how far an update is from the nearest that the participant's own sums allow.

    Args:
        update: as received.
        state: that the round began with.
        known: the participant's samples, with their sums.
        solved: of round 0.
        steps: of the classifier in a round.
        codec: of the updates.

    Returns:
        The difference; None: it takes too many steps to compute.

    Raises:
        ValueError: the participant has sent no sums.
    """
    if known.sums is None:
        raise ValueError("a step cannot be computed without the participant's sums")
    if steps > _MAX_STEPS:
        return None
    model = _StepModel.of(state, known.features, known.sums, solved)
    sent = _flat(update[TAIL_WEIGHT], update[TAIL_BIAS])
    before = _flat(state[TAIL_WEIGHT], state[TAIL_BIAS])

    def distance(decay: float) -> float:
        return float((model.run(decay, steps) - sent).norm())

    ridge_decay = solved.classifier.strength / max(1, solved.classifier.count)
    decay = _nearest(distance, ridge_decay * _MIN_DECAY_SHARE / MAX_FACTOR, ridge_decay)
    change = model.run(decay, steps) - before
    return Difference(distance(decay), _limit(codec, change, before))


@dataclass(frozen=True)
class _StepModel:
    """A device's steps of penalised logistic regression, from its sums.

    Attributes:
        weight, bias: of the tail before them, [C, r] and [C], float64.
        centred: the features, less the mean of all participants', [n, r].
        mean: [r].
        targets: sums of the centred features in each class, over n, [C, r].
        shares: of the classes, [C].
        variances: of the features of all participants, [r].
        first: the gradient of the first step, [C, r] and [C].
    """

    weight: Tensor
    bias: Tensor
    centred: Tensor
    mean: Tensor
    targets: Tensor
    shares: Tensor
    variances: Tensor
    first: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, state: State, features: Tensor, sums: Sums, solved: Solved) -> _StepModel:
        """Compute what the steps with any decay have in common."""
        weight, bias = state[TAIL_WEIGHT].double(), state[TAIL_BIAS].double()
        mean, count = solved.mean, len(features)
        centred = features.double() - mean
        counts = sums.counts.double()
        targets = (sums.features.double() - counts[:, None] * mean) / count
        shares = counts / count
        probabilities = (centred @ weight.T + (bias + weight @ mean)).softmax(dim=1)
        first = _gradient(probabilities, centred, targets, shares)
        return cls(weight, bias, centred, mean, targets, shares, solved.variances, first)

    def run(self, decay: float, steps: int) -> Tensor:
        """Return the flattened tail after the steps with this decay."""
        used = self.variances > 0
        penalty = torch.where(used, decay / self.variances.clamp(min=1e-30), 0.0)
        step = torch.where(used, 1 / (self.variances / _CURVATURE + penalty).clamp(min=1e-30), 0.0)
        weight, bias = self.weight, self.bias
        for number in range(steps):
            slope, offset = self.first
            if number:
                logits = self.centred @ weight.T + (bias + weight @ self.mean)
                slope, offset = _gradient(
                    logits.softmax(dim=1), self.centred, self.targets, self.shares
                )
            change = (slope + penalty * weight) * step
            weight, bias = weight - change, bias - _CURVATURE * offset + change @ self.mean
        return _flat(weight, bias)


def _gradient(
    probabilities: Tensor, centred: Tensor, targets: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    slope = probabilities.T @ centred / len(centred) - targets
    return slope, probabilities.mean(dim=0) - shares


def _nearest(distance: Callable[[float], float], low: float, high: float) -> float:
    """Find the decay with the smallest distance, in logarithms: a grid, then golden section."""
    start, end = math.log(max(low, 1e-300)), math.log(max(high, 1e-300))
    grid = [start + (end - start) * place / (_GRID - 1) for place in range(_GRID)]
    best = min(range(_GRID), key=lambda place: distance(math.exp(grid[place])))
    left, right = grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)]
    for _ in range(_REFINEMENTS):
        width = _GOLDEN * (right - left)
        if distance(math.exp(right - width)) <= distance(math.exp(left + width)):
            right = left + width
        else:
            left = right - width
    return math.exp((left + right) / 2)


def _limit(codec: str, change: Tensor, state: Tensor) -> float:
    error = _CODEC_ERRORS.get(parse_codec(codec).base, _OTHER_ERROR)
    return error * float(change.norm()) + _NEGLIGIBLE * float(state.norm())


def _flat(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight.double().flatten(), bias.double()])
