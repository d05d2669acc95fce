"""DP-FedAvg: the mean of clipped changes, with Gaussian noise (McMahan et al., arXiv 1710.06963).

What is protected is a participant: its whole update, prompts and tail together, is one change of
bounded length, and everybody weighs the same, since a weight by samples would tell of the data.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from protocol.errors import EmptyUpdate, InvalidField, NonFinite, WrongShape
from protocol.plan import RunPlan
from protocol.seeds import derive_seed

_BITS = 52  # of a random fraction: with half a step added, float64 still holds it exactly


def private_mean(
    updates: Iterable[Callable[[], Mapping[str, Tensor]]],
    state: Mapping[str, Tensor],
    *,
    clip: float,
    noise_multiplier: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """The state plus the mean of the clipped changes plus noise, in float64, cast to float32.

    A change u - state of a length ‖u - state‖ above clip is shortened to it. Each of n updates
    weighs 1 / n. The noise of every number has the standard deviation noise_multiplier clip / n.

    Args:
        updates: give their tensors; their order is the caller's, and one is in memory at a time.
        state: that of the round's beginning, the same tensors.
        clip: L2 bound of a change, over all its tensors; above 0.
        noise_multiplier: 0: no noise.
        generator: of the noise; None: the operating system's entropy, which nobody can repeat.

    Raises:
        EmptyUpdate: there is no update.
        WrongShape: an update does not hold the state's tensors.
        InvalidField: a tensor that is not of floating point, which has no length to clip.
        NonFinite: a change, or the mean in float32, is not finite.
    """
    base = {name: _plain(name, state[name]) for name in sorted(state)}
    sums = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    count = 0
    for load in updates:
        change = clipped(_change(load(), base), clip)
        for name, total in sums.items():
            total += change[name]
        count += 1
    if count == 0:
        raise EmptyUpdate("there is no update to average", field="updates", limit=1, value=0)
    deviation = noise_multiplier * clip
    mean: dict[str, Tensor] = {}
    for name, total in sums.items():
        if deviation:
            total += deviation * normal(total.shape, generator)
        mean[name] = (base[name] + total / count).to(torch.float32)
        if not bool(torch.isfinite(mean[name]).all()):
            raise NonFinite("the average is not finite", field=name)
    return mean


def clipped(change: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """A change of at most this length, over all its tensors; a shorter one as it is.

    Raises:
        NonFinite: it has no length.
    """
    length = math.sqrt(math.fsum(float(tensor.square().sum()) for tensor in change.values()))
    if not math.isfinite(length):
        raise NonFinite("a change has no finite length", field="update")
    if length <= clip:
        return dict(change)
    return {name: tensor * (clip / length) for name, tensor in change.items()}


def normal(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in float64, from a generator or from the system's entropy."""
    if generator is not None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    count = shape.numel()
    if count == 0:
        return torch.zeros(shape, dtype=torch.float64)
    words = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    # The middle of one of 2^52 equal steps from 0 to 1, through the inverse of the distribution.
    fractions = ((words & (2**_BITS - 1)).to(torch.float64) + 0.5) * 2.0**-_BITS
    numbers: Tensor = torch.special.ndtri(fractions)
    return numbers.reshape(shape)


def _change(update: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if update.keys() != base.keys():
        raise WrongShape(
            "an update holds exactly the tensors of the global state",
            field="tensors",
            limit=sorted(base),
            value=sorted(update),
        )
    change: dict[str, Tensor] = {}
    for name, tensor in base.items():
        if update[name].shape != tensor.shape:
            raise WrongShape(
                "the updates differ in shape",
                field=name,
                limit=list(tensor.shape),
                value=list(update[name].shape),
            )
        change[name] = _plain(name, update[name]) - tensor
    return change


def _plain(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise InvalidField(
            "differential privacy takes tensors of floating point alone: nothing else can be "
            "clipped and noised",
            field=name,
            value=str(tensor.dtype),
        )
    return tensor.to(torch.float64)


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


def noise_generator(settings: RunPlan, round_: int, attempt: int) -> torch.Generator | None:
    """The noise of one attempt at a round: None, the system's entropy, unless a seed is asked for.

    The run's own seed will not do: every participant knows it, and could take the noise off.
    """
    seed = settings.federation.dp_seed
    if seed is None:
        return None
    own = derive_seed(seed, "privacy noise", settings.seed, round_, attempt)
    return torch.Generator().manual_seed(own)
