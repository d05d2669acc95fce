"""How much privacy noised rounds have cost: Rényi differential privacy, in integer orders.

A round is the Gaussian mechanism on a sample of the participants. Its Rényi divergence is that of
Mironov, Talwar and Zhang (arXiv 1908.10530, section 3.3), which is exact for Poisson sampling;
divergences of rounds add up (Mironov, arXiv 1702.07476, proposition 1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from protocol.errors import InvalidField

ORDERS = (*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), *range(320, 1025, 64))


def epsilon_of(rates: Iterable[float], noise_multiplier: float, delta: float) -> float:
    """The epsilon that rounds have cost at this delta; infinite without noise.

    Args:
        rates: of each round, the chance of a participant to be drawn, from 0 to 1.
        noise_multiplier: the noise's standard deviation over the bound of one contribution.
        delta: above 0, below 1.

    Raises:
        InvalidField: an argument is out of its range.
    """
    if not 0 < delta < 1:
        raise InvalidField("delta is a chance", field="delta", limit="0 to 1", value=delta)
    spent = [0.0] * len(ORDERS)
    for rate, rounds in Counter(rates).items():
        for place, cost in enumerate(_divergences(rate, noise_multiplier)):
            spent[place] += rounds * cost
    return min(converted(cost, order, delta) for cost, order in zip(spent, ORDERS, strict=True))


def divergence(rate: float, noise_multiplier: float, order: int) -> float:
    """Rényi divergence of one round, in nats: log A / (order - 1), with

    A = sum over k of C(order, k) (1 - q)^(order - k) q^k exp((k^2 - k) / (2 z^2)).

    Args:
        rate: q, the chance of a participant to be drawn.
        noise_multiplier: z.
        order: at least 2.

    Raises:
        InvalidField: an argument is out of its range.
    """
    if not 0 <= rate <= 1:
        raise InvalidField("a rate is a chance", field="rate", limit="0 to 1", value=rate)
    if noise_multiplier < 0:
        raise InvalidField(
            "no standard deviation is negative",
            field="noise_multiplier",
            limit=0,
            value=noise_multiplier,
        )
    if order < 2:
        raise InvalidField("the order is too low", field="order", limit=2, value=order)
    if rate == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    twice = 2 * noise_multiplier**2
    if rate == 1:
        return order / twice
    terms = [
        _log_binomial(order, k)
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + (k * k - k) / twice
        for k in range(order + 1)
    ]
    total = _log_sum(terms) / (order - 1)
    return max(0.0, total) if math.isfinite(total) else math.inf


def converted(spent: float, order: int, delta: float) -> float:
    """From (order, spent) in Rényi's sense to the epsilon at delta.

    By Canonne, Kamath and Steinke (arXiv 2004.00010, proposition 12), which is never above the
    conversion of Mironov's proposition 3: spent + log(1 / delta) / (order - 1).
    """
    if math.isinf(spent):
        return math.inf
    epsilon = spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(0.0, epsilon)


@lru_cache(maxsize=1024)
def _divergences(rate: float, noise_multiplier: float) -> tuple[float, ...]:
    return tuple(divergence(rate, noise_multiplier, order) for order in ORDERS)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_sum(logs: list[float]) -> float:
    """The logarithm of the sum of what these are the logarithms of."""
    largest = max(logs)
    if math.isinf(largest):
        return largest
    return largest + math.log(math.fsum(math.exp(one - largest) for one in logs))
