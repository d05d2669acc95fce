"""Attacks: the updates that hostile devices send instead of honest ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.seeds import derive_seed

WEIGHT, BIAS = "tail.head.weight", "tail.head.bias"

TARGET = 0  # the class that a backdoor makes the model predict

_HUGE = 1e30

_LENGTH = 9.0  # norm of a hostile change in norms of an honest one: within the default bound

_EPOCHS, _BATCH, _RATE = 10, 16, 1e-2

State = dict[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """The training data of one device, as frozen features.

    Attributes:
        features: features of the images, [n, F].
        patched: features of the same images with the patch of a backdoor, [n, F].
        labels: classes of the images, [n].
        seed: seed of the order of the batches and of the noise.
    """

    features: Tensor
    patched: Tensor
    labels: Tensor
    seed: int


def train_honestly(state: Mapping[str, Tensor], shard: Shard) -> State:
    """Return the state after honest training of a device."""
    return _train(state, shard.features, shard.labels, shard.seed)


def _huge(state: Mapping[str, Tensor], _shard: Shard) -> State:
    return {name: tensor + _HUGE for name, tensor in state.items()}


def _noise(state: Mapping[str, Tensor], shard: Shard) -> State:
    change = _change(state, train_honestly(state, shard))
    generator = torch.Generator().manual_seed(derive_seed(shard.seed, "noise"))
    noise = {name: torch.randn(each.shape, generator=generator) for name, each in change.items()}
    factor = _LENGTH * _norm(change) / _norm(noise)
    return {name: state[name] + factor * noise[name] for name in state}


def _flip_sign(state: Mapping[str, Tensor], shard: Shard) -> State:
    change = _change(state, train_honestly(state, shard))
    return {name: state[name] - _LENGTH * change[name] for name in state}


def _flip_labels(state: Mapping[str, Tensor], shard: Shard) -> State:
    flipped = len(state[BIAS]) - 1 - shard.labels
    return _train(state, shard.features, flipped, shard.seed)


def _backdoor(state: Mapping[str, Tensor], shard: Shard) -> State:
    features = torch.cat([shard.features, shard.patched])
    labels = torch.cat([shard.labels, torch.full_like(shard.labels, TARGET)])
    return _train(state, features, labels, shard.seed)


ATTACKS: Final[Mapping[str, Callable[[Mapping[str, Tensor], Shard], State]]] = {
    "huge": _huge,  # adds 1e30 to each element
    "noise": _noise,  # Gaussian noise with nine times the norm of an honest change
    "sign-flip": _flip_sign,  # an honest change times -9
    "label-flip": _flip_labels,  # training on labels C - 1 - y
    "backdoor": _backdoor,  # training also on patched images with class 0
}


def predict(state: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return the predicted classes [n] of features [n, F]."""
    return (features @ state[WEIGHT].T + state[BIAS]).argmax(dim=1)


def _train(state: Mapping[str, Tensor], features: Tensor, labels: Tensor, seed: int) -> State:
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(labels), generator=generator).split(_BATCH):
            logits = features[batch] @ parameters[WEIGHT].T + parameters[BIAS]
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _change(state: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> State:
    return {name: update[name] - state[name] for name in state}


def _norm(change: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))
