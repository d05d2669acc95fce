"""Updates of the closed form against what the server computes from the participant's own sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from split_model.linear_fit import Features, step_classifier
from split_server.closed_form.basis import Basis
from split_server.closed_form.classifier import FeatureSums, fit_classifier
from split_server.closed_form.known import KnownSamples
from split_server.closed_form.result import Solved
from split_server.closed_form.steps import (
    Difference,
    logit_factor,
    measure_start,
    measure_step,
    scaled_classifier,
)
from split_server.closed_form.sums import Sums
from split_server.storage.run_files import TAIL_BIAS, TAIL_WEIGHT

CLASSES, RANK, COUNT = 5, 12, 60

GENERATOR = torch.Generator().manual_seed(0)

LABELS = torch.arange(COUNT) % CLASSES

FEATURES = torch.randn(CLASSES, RANK, generator=GENERATOR)[LABELS] + torch.randn(
    COUNT, RANK, generator=GENERATOR
)


def sums_of(labels: Tensor) -> Sums:
    one_hot = F.one_hot(labels, CLASSES).double()
    return Sums((one_hot.T @ FEATURES.double()).float(), one_hot.sum(dim=0).float())


def solve() -> Solved:
    values = FEATURES.double()
    mean = values.mean(dim=0)
    moments = FeatureSums(COUNT, mean, (values - mean).T @ (values - mean))
    own = sums_of(LABELS)
    ones = torch.ones(RANK, dtype=torch.float64)
    fit = fit_classifier(moments, own.features.double(), own.counts.double(), ones)
    return Solved(Basis(mean, torch.eye(RANK), ones), fit, mean, moments.variances)


SOLVED = solve()

STATE = {TAIL_WEIGHT: 6 * SOLVED.classifier.weight, TAIL_BIAS: 6 * SOLVED.classifier.bias}

STRENGTH = SOLVED.classifier.strength / COUNT


def steps_of(labels: Tensor, count: int = 1, decay: float = STRENGTH / 8) -> dict[str, Tensor]:
    """The device's own code."""
    mean, variances = SOLVED.mean.float().numpy(), SOLVED.variances.float().numpy()
    features = Features(FEATURES.numpy(), mean, variances, STRENGTH)
    tail = STATE[TAIL_WEIGHT].numpy(), STATE[TAIL_BIAS].numpy()
    for _ in range(count):
        tail, _ = step_classifier(*tail, features, labels.numpy(), decay)
    names = (TAIL_WEIGHT, TAIL_BIAS)
    return {name: torch.from_numpy(array).float() for name, array in zip(names, tail, strict=True)}


def measured(
    update: dict[str, Tensor], labels: Tensor = LABELS, steps: int = 1, codec: str = "float16"
) -> Difference:
    known = KnownSamples(FEATURES, sums_of(labels))
    result = measure_step(update, STATE, known, SOLVED, steps=steps, codec=codec)
    assert result is not None
    return result


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("share", [0.004, 1 / 8, 1.0])
def test_the_steps_of_a_device_are_known_whatever_its_penalty(steps: int, share: float) -> None:
    result = measured(steps_of(LABELS, steps, share * STRENGTH), steps=steps)
    assert result.norm < 0.05 * result.limit


def test_rounding_by_the_codec_is_allowed() -> None:
    update = steps_of(LABELS)
    rounded = {name: STATE[name] + (update[name] - STATE[name]).half().float() for name in update}
    assert not measured(rounded).is_refused


def test_a_step_on_other_labels_than_the_sums_is_refused() -> None:
    assert measured(steps_of(CLASSES - 1 - LABELS)).is_refused
    assert measured(steps_of(LABELS), labels=CLASSES - 1 - LABELS).is_refused


@pytest.mark.parametrize("factor", [-1.0, 0.0, 3.0, 1e30, float("nan")])
def test_a_step_of_another_length_or_direction_is_refused(factor: float) -> None:
    honest = steps_of(LABELS)
    update = {name: STATE[name] + factor * (honest[name] - STATE[name]) for name in honest}
    assert measured(update).is_refused


def test_steps_beyond_what_the_server_computes_are_not_checked() -> None:
    known = KnownSamples(FEATURES, sums_of(LABELS))
    assert measure_step(STATE, STATE, known, SOLVED, steps=100, codec="float16") is None


@pytest.mark.parametrize(
    ("factor", "refused"),
    [(1.0, False), (9.0, False), (31.0, False), (0.1, True), (-5.0, True), (1e6, True)],
)
def test_an_update_of_round_0_is_the_classifier_times_a_factor(
    factor: float, refused: bool
) -> None:
    fit = SOLVED.classifier
    update = {TAIL_WEIGHT: factor * fit.weight, TAIL_BIAS: factor * fit.bias}
    assert measure_start(update, SOLVED, "float16").is_refused is refused
    update[TAIL_WEIGHT] = update[TAIL_WEIGHT].flip(0)
    assert measure_start(update, SOLVED, "float16").is_refused


def test_the_state_of_round_0_has_the_median_factor() -> None:
    fit = SOLVED.classifier
    updates = [
        ({TAIL_WEIGHT: factor * fit.weight, TAIL_BIAS: factor * fit.bias}, samples)
        for factor, samples in ((4.0, 10), (31.0, 30), (5.0, 10), (6.0, 50))
    ]
    assert logit_factor(scaled_classifier(SOLVED, updates), SOLVED) == pytest.approx(6.0)
