"""What every phase of a round works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from edge_client.data import BatchReader, shuffled
from edge_client.model import DeviceModel
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.smashed.uploads import SampleUploader
from edge_client.transport import SamplesMissing
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from split_model import learning_rate_factor


class Proximal:
    """The term mu / 2 * ||w - w_round||^2 of FedProx (Li et al., arXiv 1812.06127).

    It is added as its gradient, so that reported losses are those of the samples alone.

    Args:
        model: with the round's global state in it.
        strength: mu, above 0.
    """

    def __init__(self, model: DeviceModel, strength: float) -> None:
        self._strength = strength
        self._tuned = [(own, own.detach().clone()) for own in model.parameters()]

    def add_gradients(self) -> None:
        """Add the term's gradient, mu (w - w_round), to those that are there."""
        for own, start in self._tuned:
            pull = (own.detach() - start) * self._strength
            own.grad = pull if own.grad is None else own.grad + pull


R = TypeVar("R")

Advance = Callable[[str, int, int], None]  # phase, batches done, batches in all

_SENDINGS = 3  # of samples that a request lacks, before it brings them itself


class Diverged(Exception):
    """Loss or gradients are not finite any more: there is nothing to train with."""


@dataclass(frozen=True)
class Samples:
    """One set of the device's samples, and what is known of them.

    ``outputs`` where the head's output is constant (prompts at the cut); ``kept`` where the
    server keeps it too.
    """

    images: BatchReader
    outputs: HeadOutputs | None = None
    kept: SampleUploader | None = None

    def __len__(self) -> int:
        return len(self.images)

    def with_batch(self, positions: Tensor, view: int | None, request: Callable[[Tensor], R]) -> R:
        """Make a request of the split plane with these samples, by their ids where they are kept.

        Samples that the server has lost are sent again, and the request after them. Where it
        cannot even keep one batch, the batch goes with the request itself.
        """
        if self.outputs is None:
            raise ValueError("the head's output is not constant in this run")
        if self.kept is None:
            return request(self.outputs.smashed(positions, view))
        for _ in range(_SENDINGS):
            try:
                return request(self.kept.ids(positions, view))
            except SamplesMissing as error:
                self.kept.send(positions[error.places], view)
        return request(self.outputs.smashed(positions, view))


@dataclass
class RoundContext:
    """One participant's round: its model, its samples, and the draws that belong to the round."""

    run: RunPlan
    participant: str
    round: int  # from 1
    attempt: int
    model: DeviceModel
    samples: Samples
    advance: Advance
    proximal: Proximal | None = None

    def pull(self) -> None:
        """Add FedProx's gradient to that of a batch, if the run has it."""
        if self.proximal is not None:
            self.proximal.add_gradients()

    def seed(self, purpose: str) -> int:
        """A seed for one purpose in this round of this participant."""
        return derive_seed(self.run.seed, purpose, self.participant, self.round)

    def noise(self, step: int) -> torch.Generator | None:
        """What rounds a step's gradients at random, if the run asks for it."""
        if not self.run.wire.stochastic_rounding:
            return None
        seed = derive_seed(self.run.seed, "rounding", self.participant, self.round, step)
        return torch.Generator().manual_seed(seed)

    def batches(self, purpose: str, kept: Tensor, epochs: int) -> Iterator[tuple[int, Tensor]]:
        """(epoch, sample positions [b]) over ``kept`` [n], shuffled anew in every epoch."""
        size, seed = self.run.training.batch_size, self.seed(purpose)
        total, done = epochs * -(-len(kept) // size), 0
        for epoch in range(epochs):
            for order in shuffled(len(kept), size, seed, epoch):
                yield epoch, kept[order]
                done += 1
                self.advance(purpose, done, total)

    def epoch_of_run(self, epoch: int) -> int:
        """The number, over all rounds, of an epoch of this one: split training follows local."""
        training = self.run.training
        return (self.round - 1) * (training.local_epochs + training.split_epochs) + epoch

    def view(self, epoch: int) -> int | None:
        """Which view of a sample an epoch of this round sees, where there is a fixed number."""
        training = self.run.training
        return self.epoch_of_run(epoch) % training.views if training.augment else None

    def rate_factor(self, done: int, total: int) -> float:
        """The schedule's factor when ``done`` of ``total`` steps of this round are behind."""
        rounds = self.run.federation.rounds
        progress = (self.round - 1 + done / total) / rounds
        return learning_rate_factor(self.run.training, progress, rounds)
