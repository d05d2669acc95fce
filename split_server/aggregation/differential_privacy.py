"""DP-FedAvg: the mean of clipped changes with Gaussian noise, and its privacy accounting.

The unit of privacy is a participant: its whole update, prompts and tail together, is one change
with a bounded norm. All updates have equal weights, since weights by samples would reveal their
number.

Source: McMahan et al., arXiv 1710.06963.
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

_BITS = 52  # bits of a random fraction: float64 represents it plus half a step exactly

# Rényi orders at which the accountant measures the divergence
ORDERS = (*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), *range(320, 1025, 64))


def private_mean(
    updates: Iterable[Callable[[], Mapping[str, Tensor]]],
    state: Mapping[str, Tensor],
    *,
    clip: float,
    noise_multiplier: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Compute the state plus the mean of the clipped changes plus noise.

    Computes in float64 and casts to float32. A change u - state whose norm exceeds ``clip`` is
    scaled down to it. Each of n updates weighs 1 / n. The noise of each number has the standard
    deviation noise_multiplier clip / n.

    Args:
        updates: functions that read the tensors of an update, in a fixed order; one update is in
            memory at a time.
        state: the global state before the round, with the same tensors.
        clip: L2 bound of a change over all its tensors, above 0.
        noise_multiplier: standard deviation of the sum's noise, divided by ``clip``; 0: no noise.
        generator: generator of the noise; None: entropy of the operating system, which cannot be
            repeated.

    Raises:
        EmptyUpdate: there is no update.
        WrongShape: an update and the state have different tensors.
        InvalidField: a tensor is not floating-point, so that it cannot be clipped.
        NonFinite: a change, or the mean in float32, is not finite.
    """
    base = {name: _to_float64(name, state[name]) for name in sorted(state)}
    sums = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    count = 0
    for load in updates:
        change = clip_change(_change(load(), base), clip)
        for name, total in sums.items():
            total += change[name]
        count += 1
    if count == 0:
        raise EmptyUpdate("there is no update to average", field="updates", limit=1, value=0)
    deviation = noise_multiplier * clip
    mean: dict[str, Tensor] = {}
    for name, total in sums.items():
        if deviation:
            total += deviation * draw_normal(total.shape, generator)
        mean[name] = (base[name] + total / count).to(torch.float32)
        if not bool(torch.isfinite(mean[name]).all()):
            raise NonFinite("the average is not finite", field=name)
    return mean


def clip_change(change: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Scale a change down to the norm ``clip`` over all its tensors, if its norm is larger.

    Raises:
        NonFinite: the norm is not finite.
    """
    norm = math.sqrt(math.fsum(float(tensor.square().sum()) for tensor in change.values()))
    if not math.isfinite(norm):
        raise NonFinite("the norm of a change is not finite", field="update")
    if norm <= clip:
        return dict(change)
    return {name: tensor * (clip / norm) for name, tensor in change.items()}


def draw_normal(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal float64 numbers; without a generator, from the system's entropy."""
    if generator is not None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    count = shape.numel()
    if count == 0:
        return torch.zeros(shape, dtype=torch.float64)
    words = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    # The inverse distribution function of the middle of one of 2^52 equal steps from 0 to 1.
    fractions = ((words & (2**_BITS - 1)).to(torch.float64) + 0.5) * 2.0**-_BITS
    numbers: Tensor = torch.special.ndtri(fractions)
    return numbers.reshape(shape)


def _change(update: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if update.keys() != base.keys():
        raise WrongShape(
            "an update must have exactly the tensors of the global state",
            field="tensors",
            limit=sorted(base),
            value=sorted(update),
        )
    change: dict[str, Tensor] = {}
    for name, tensor in base.items():
        if update[name].shape != tensor.shape:
            raise WrongShape(
                "an update's tensor differs in shape from the global state",
                field=name,
                limit=list(tensor.shape),
                value=list(update[name].shape),
            )
        change[name] = _to_float64(name, update[name]) - tensor
    return change


def _to_float64(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise InvalidField(
            "differential privacy needs floating-point tensors, which can be clipped and noised",
            field=name,
            value=str(tensor.dtype),
        )
    return tensor.to(torch.float64)


def compute_epsilon(rates: Iterable[float], noise_multiplier: float, delta: float) -> float:
    """Compute the epsilon spent in a sequence of rounds at a delta; infinite without noise.

    Args:
        rates: each round's probability that a participant is sampled, from 0 to 1.
        noise_multiplier: the noise's standard deviation, divided by ``clip``.
        delta: above 0, below 1.

    Raises:
        InvalidField: an argument is out of its range.
    """
    if not 0 < delta < 1:
        raise InvalidField(
            "delta must be a probability above 0 and below 1",
            field="delta",
            limit="0 to 1",
            value=delta,
        )
    spent = [0.0] * len(ORDERS)
    for rate, rounds in Counter(rates).items():
        for place, cost in enumerate(_divergences(rate, noise_multiplier)):
            spent[place] += rounds * cost
    return min(
        convert_to_epsilon(cost, order, delta) for cost, order in zip(spent, ORDERS, strict=True)
    )


def compute_divergence(rate: float, noise_multiplier: float, order: int) -> float:
    """Compute the Rényi divergence of one round in nats.

    It is log A / (order - 1), with
    A = sum over k of C(order, k) (1 - q)^(order - k) q^k exp((k^2 - k) / (2 z^2)).

    Args:
        rate: q, the probability that a participant is sampled.
        noise_multiplier: z, the noise's standard deviation divided by ``clip``.
        order: the Rényi order, at least 2.

    Raises:
        InvalidField: an argument is out of its range.
    """
    if not 0 <= rate <= 1:
        raise InvalidField("a rate must be a probability", field="rate", limit="0 to 1", value=rate)
    if noise_multiplier < 0:
        raise InvalidField(
            "the noise multiplier must not be negative",
            field="noise_multiplier",
            limit=0,
            value=noise_multiplier,
        )
    if order < 2:
        raise InvalidField("a Rényi order must be at least 2", field="order", limit=2, value=order)
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


def convert_to_epsilon(spent: float, order: int, delta: float) -> float:
    """Convert a Rényi divergence ``spent`` of an order to the epsilon at a delta.

    The result is at most that of Mironov's conversion, spent + log(1 / delta) / (order - 1).

    Source: Canonne, Kamath and Steinke, arXiv 2004.00010, proposition 12.
    """
    if math.isinf(spent):
        return math.inf
    epsilon = spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(0.0, epsilon)


@lru_cache(maxsize=1024)
def _divergences(rate: float, noise_multiplier: float) -> tuple[float, ...]:
    return tuple(compute_divergence(rate, noise_multiplier, order) for order in ORDERS)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_sum(logs: list[float]) -> float:
    """Compute log(sum(exp(logs)))."""
    largest = max(logs)
    if math.isinf(largest):
        return largest
    return largest + math.log(math.fsum(math.exp(value - largest) for value in logs))


def make_noise_generator(settings: RunPlan, round_: int, attempt: int) -> torch.Generator | None:
    """Make the noise generator of an attempt at a round from ``federation.dp_seed``.

    Without that seed it returns None: the noise then comes from the system's entropy. It does not
    use the run's seed, since participants know it and could subtract the noise.
    """
    seed = settings.federation.dp_seed
    if seed is None:
        return None
    noise_seed = derive_seed(seed, "privacy noise", settings.seed, round_, attempt)
    return torch.Generator().manual_seed(noise_seed)
