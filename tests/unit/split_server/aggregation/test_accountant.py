"""The accountant against integrals, published figures and the exact Gaussian mechanism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidField
from split_server.aggregation.differential_privacy import (
    ORDERS,
    compute_divergence,
    compute_epsilon,
    convert_to_epsilon,
)


@pytest.mark.parametrize(
    ("rate", "noise", "rounds", "order", "published"),
    [  # from the tests of TensorFlow Privacy's accountant
        (0.01, 2.5, 50, 5, 0.00218075),
        (0.01, 2.5, 50, 50, 0.023846),
        (0.01, 2.5, 50, 100, 167.416307),
        (0.1, 2, 10, 5, 0.07737),
    ],
)
def test_published_divergences(
    rate: float, noise: float, rounds: int, order: int, published: float
) -> None:
    assert rounds * compute_divergence(rate, noise, order) == pytest.approx(published, abs=1e-5)


def test_full_participation_is_the_plain_gaussian_mechanism() -> None:
    assert compute_divergence(1.0, 2.0, 6) == 6 / 8  # order / (2 z^2)
    assert compute_divergence(1 - 1e-12, 2.0, 6) == pytest.approx(6 / 8)
    assert compute_divergence(0.0, 2.0, 6) == 0


def integrated(rate: float, noise: float, order: int) -> tuple[float, float]:
    """Sum the Rényi divergences of the mixture from the plain noise and in reverse."""
    x = np.linspace(-order - 40 * noise, order + 40 * noise, 400_001)
    plain = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    moved = plain + (2 * x - 1) / (2 * noise**2)
    mixed = np.logaddexp(math.log1p(-rate) + plain, math.log(rate) + moved)

    def of(one: np.ndarray, other: np.ndarray) -> float:
        inside = order * one + (1 - order) * other
        top = inside.max()
        return float(top + np.log(np.trapezoid(np.exp(inside - top), x))) / (order - 1)

    return of(mixed, plain), of(plain, mixed)


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("noise", [0.6, 1.0, 4.0])
@pytest.mark.parametrize("order", [2, 3, 17])
def test_a_sampled_round_by_numerical_integration(rate: float, noise: float, order: int) -> None:
    forward, backward = integrated(rate, noise, order)
    assert compute_divergence(rate, noise, order) == pytest.approx(forward, rel=1e-6)
    assert backward <= forward * (1 + 1e-6)  # the larger one counts


def exact_delta(noise: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism with sensitivity 1 (arXiv 1805.06530, theorem 8)."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    half, far = 1 / (2 * noise), epsilon * noise
    return below(half - far) - math.exp(epsilon) * below(-half - far)


@pytest.mark.parametrize("noise", [0.8, 2.0, 10.0])
@pytest.mark.parametrize("rounds", [1, 20])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_epsilon_bounds_the_exact_one_closely(noise: float, rounds: int, delta: float) -> None:
    """T rounds with full participation equal one round with noise z / sqrt(T)."""
    whole = noise / math.sqrt(rounds)
    epsilon = compute_epsilon([1.0] * rounds, noise, delta)
    assert exact_delta(whole, epsilon) <= delta
    assert exact_delta(whole, 0.75 * epsilon) > delta


def test_one_round_worked_out_by_hand() -> None:
    # z = 2, delta = 0.01; at order 7: 7/8 + ln(6/7) - (ln 0.01 + ln 7) / 6
    assert convert_to_epsilon(7 / 8, 7, 0.01) == pytest.approx(1.1640594, rel=1e-6)
    assert compute_epsilon([1.0], 2.0, 0.01) <= 1.1640594


def test_the_conversion_is_never_above_mironovs() -> None:
    for order in ORDERS:
        assert convert_to_epsilon(1.5, order, 1e-3) <= 1.5 + math.log(1e3) / (order - 1)


@settings(deadline=None, max_examples=25)
@given(
    rate=st.floats(0.01, 1),
    noise=st.floats(0.3, 20),
    rounds=st.integers(1, 30),
    delta=st.floats(1e-9, 0.1),
)
def test_epsilon_rises_with_rounds_and_rate_and_falls_with_noise_and_delta(
    rate: float, noise: float, rounds: int, delta: float
) -> None:
    here = compute_epsilon([rate] * rounds, noise, delta)
    assert 0 <= here <= compute_epsilon([rate] * (rounds + 5), noise, delta)
    assert here <= compute_epsilon([1.0] * rounds, noise, delta) + 1e-9
    assert here >= compute_epsilon([rate] * rounds, 2 * noise, delta)
    assert here >= compute_epsilon([rate] * rounds, noise, 2 * delta)


def test_no_noise_is_no_privacy_and_no_round_costs_nothing() -> None:
    assert compute_epsilon([0.5], 0.0, 1e-3) == math.inf
    assert compute_epsilon([], 1.0, 1e-3) == 0.0
    assert compute_epsilon([0.0], 1.0, 1e-3) == 0.0


@pytest.mark.parametrize(
    ("rate", "noise", "order", "field"),
    [(1.1, 1.0, 2, "rate"), (0.1, -1.0, 2, "noise_multiplier"), (0.1, 1.0, 1, "order")],
)
def test_arguments_out_of_range_are_refused(
    rate: float, noise: float, order: int, field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        compute_divergence(rate, noise, order)
    assert caught.value.field == field
    with pytest.raises(InvalidField):
        compute_epsilon([0.1], 1.0, 0.0)
