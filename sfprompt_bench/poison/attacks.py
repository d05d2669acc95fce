"""What hostile devices send in round 0 and in later rounds, in place of an honest device's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.seeds import derive_seed
from split_model.linear_fit import Features, Fit, scale_fit, step_classifier
from split_server.closed_form.sums import Sums
from split_server.storage.run_files import TAIL_BIAS, TAIL_WEIGHT

TARGET = 0  # the class that a backdoor turns images into

_HUGE = 1e30

_LENGTH = 9.0  # times an honest change: just within the default bound

ATTACKS: Final[Mapping[str, str]] = {
    "huge": "finite numbers of 1e30",
    "noise": "noise, nine times as long as an honest change",
    "sign-flip": "the negative of a change, nine times as long; sums mirrored at their mean",
    "label-flip": "labels C - 1 - y",
    "backdoor": "also images with a patch, as class 0",
}

State = dict[str, Tensor]


@dataclass
class Device:
    """One device of the run, honest or hostile.

    Attributes:
        number: of the device.
        attack: what it tries; None: it is honest.
        labels: of its images, as it trains on them, [n].
        features: once the server has sent them.
        decay: of its later steps.
        is_refused: whether its sums of round 0 were refused.
    """

    number: int
    attack: str | None
    labels: Tensor
    features: Features | None = None
    decay: float = 0.0
    is_refused: bool = False

    def honest_sums(self, classes: int) -> Sums:
        """Return the sums of its features in each class."""
        one_hot = F.one_hot(self.labels, classes).double()
        sums = one_hot.T @ torch.from_numpy(self._known.values).double()
        return Sums(sums.float(), one_hot.sum(dim=0).float())

    def sums(self, classes: int) -> Sums:
        """Return the sums that it sends in round 0."""
        sums = self.honest_sums(classes)
        if self.attack == "huge":
            return Sums(sums.features + _HUGE, sums.counts)
        if self.attack == "noise":
            noise = torch.randn(sums.features.shape, generator=self._generator(0))
            factor = _LENGTH * sums.features.norm() / noise.norm()
            return Sums(sums.features + factor * noise, sums.counts)
        if self.attack == "sign-flip":  # they still add up to the sum of all features
            mean = sums.features.sum(dim=0) / sums.counts.sum()
            return Sums(2 * sums.counts[:, None] * mean - sums.features, sums.counts)
        return sums

    def start(self, fit: Fit) -> State:
        """Return its update of round 0."""
        factor, _, self.decay = scale_fit(fit, self._known.values, self.labels.numpy())
        state = {
            TAIL_WEIGHT: factor * torch.from_numpy(fit.weight),
            TAIL_BIAS: factor * torch.from_numpy(fit.bias),
        }
        return self._distorted(
            {name: torch.zeros_like(each) for name, each in state.items()}, state, 0
        )

    def step(self, state: Mapping[str, Tensor], round_: int) -> State:
        """Return its update of a later round."""
        before = [state[name].double().numpy() for name in (TAIL_WEIGHT, TAIL_BIAS)]
        (weight, bias), _ = step_classifier(
            before[0], before[1], self._known, self.labels.numpy(), self.decay
        )
        honest = {
            TAIL_WEIGHT: torch.from_numpy(weight).float(),
            TAIL_BIAS: torch.from_numpy(bias).float(),
        }
        return self._distorted(state, honest, round_)

    def _distorted(self, before: Mapping[str, Tensor], after: State, round_: int) -> State:
        """Apply the attack to the change of a state."""
        change = {name: after[name] - before[name] for name in after}
        if self.attack == "huge":
            return {name: tensor + _HUGE for name, tensor in after.items()}
        if self.attack == "sign-flip":
            return {name: before[name] - _LENGTH * change[name] for name in after}
        if self.attack == "noise":
            generator = self._generator(round_)
            noise = {
                name: torch.randn(each.shape, generator=generator) for name, each in change.items()
            }
            factor = _LENGTH * _norm(change) / _norm(noise)
            return {name: before[name] + factor * noise[name] for name in after}
        return after

    @property
    def _known(self) -> Features:
        if self.features is None:
            raise ValueError("the device has no features yet")
        return self.features

    def _generator(self, round_: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.number, "noise", round_))


def flipped(labels: Tensor, classes: int) -> Tensor:
    """Return the labels of `label-flip`."""
    return classes - 1 - labels


def scores(state: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return the scores [n, C] of features [n, r]."""
    return features @ state[TAIL_WEIGHT].T + state[TAIL_BIAS]


def _norm(change: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))
