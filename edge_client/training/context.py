"""What every phase of a round works with: run, model, samples and random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from edge_client.data.batches import BatchReader, shuffled
from edge_client.model import DeviceModel
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.smashed.uploads import SampleUploader
from edge_client.transport.split_client import Features, SamplesMissing
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from split_model.optimizer import learning_rate_factor

R = TypeVar("R")

Advance = Callable[[str, int, int], None]  # phase, batches done, batches in total

_MAX_UPLOADS = 3  # of samples that the server lacks, before the request carries them itself


class Diverged(Exception):
    """A loss, a gradient or a tuned parameter is not finite: training cannot continue."""


class Proximal:
    """The FedProx term mu / 2 * ||w - w_round||^2 (Li et al., arXiv 1812.06127).

    Only its gradient is added, so that reported losses are those of the samples alone.

    Args:
        model: with the round's global state.
        strength: mu, above 0.
    """

    def __init__(self, model: DeviceModel, strength: float) -> None:
        self._strength = strength
        self._tuned = [(tensor, tensor.detach().clone()) for tensor in model.parameters()]

    def add_gradients(self) -> None:
        """Add the term's gradient, mu (w - w_round), to the parameters' gradients."""
        for parameter, start in self._tuned:
            pull = (parameter.detach() - start) * self._strength
            parameter.grad = pull if parameter.grad is None else parameter.grad + pull


@dataclass
class FeatureCache:
    """The features of all samples of a set, once the server has sent them.

    Attributes:
        attempt: at round 0 whose basis they have.
        decay: of the tail in later rounds, see `tune_classifier`.
    """

    features: Features | None = None
    attempt: int | None = None
    decay: float = 0.0


@dataclass(frozen=True)
class Samples:
    """One set of the device's samples, with their caches.

    Attributes:
        images: reads the set's images.
        outputs: the head's outputs, where they are constant (prompts at the cut).
        uploader: sends smashed data to the server's cache, where the run has one.
        features: those of round 0, where the run has one.
    """

    images: BatchReader
    outputs: HeadOutputs | None = None
    uploader: SampleUploader | None = None
    features: FeatureCache = field(default_factory=FeatureCache)

    def __len__(self) -> int:
        return len(self.images)

    def request_with_batch(
        self, positions: Tensor, view: int | None, request: Callable[[Tensor], R]
    ) -> R:
        """Send a request of the split plane for these samples [b].

        The request names samples by id where the server caches them. Samples that the server
        lacks are uploaded and the request is repeated. If the server cannot cache even one batch,
        the request carries the smashed data itself.

        Raises:
            ValueError: the head's output is not constant in this run.
        """
        if self.outputs is None:
            raise ValueError("the head's output is not constant in this run")
        if self.uploader is None:
            return request(self.outputs.smashed(positions, view))
        for _ in range(_MAX_UPLOADS):
            try:
                return request(self.uploader.ids(positions, view))
            except SamplesMissing as error:
                self.uploader.send(positions[error.places], view)
        return request(self.outputs.smashed(positions, view))


@dataclass
class RoundContext:
    """One participant's round: its model, its samples, and the round's random draws."""

    run: RunPlan
    participant: str
    round: int  # from `RunPlan.first_round`
    attempt: int
    model: DeviceModel
    samples: Samples
    advance: Advance
    cache_bytes: int  # memory budget of a cache of the tuning method
    proximal: Proximal | None = None
    start_attempt: int | None = None  # the attempt at round 0 that counted; None: none yet
    rate_scale: float = 1.0  # of the learning rates, below 1 after discarded states

    def add_proximal_gradients(self) -> None:
        """Add FedProx's gradient to a batch's gradients, if the run uses it."""
        if self.proximal is not None:
            self.proximal.add_gradients()

    def seed(self, purpose: str) -> int:
        """Derive a seed for one purpose in this participant's round."""
        return derive_seed(self.run.seed, purpose, self.participant, self.round)

    def noise(self, step: int) -> torch.Generator | None:
        """Return the generator for a step's stochastic rounding, if the run uses it."""
        if not self.run.wire.stochastic_rounding:
            return None
        seed = derive_seed(self.run.seed, "rounding", self.participant, self.round, step)
        return torch.Generator().manual_seed(seed)

    def batches(self, purpose: str, selected: Tensor, epochs: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (epoch, sample positions [b]) over ``selected`` [k], shuffled in every epoch."""
        size, seed = self.run.training.batch_size, self.seed(purpose)
        total, done = epochs * -(-len(selected) // size), 0
        for epoch in range(epochs):
            for order in shuffled(len(selected), size, seed, epoch):
                yield epoch, selected[order]
                done += 1
                self.advance(purpose, done, total)

    def epoch_of_run(self, epoch: int) -> int:
        """Number this round's epoch over all rounds. Split epochs follow the local epochs."""
        training = self.run.training
        return (self.round - 1) * (training.local_epochs + training.split_epochs) + epoch

    def view(self, epoch: int) -> int | None:
        """Return the augmented view that this round's epoch uses; None: no augmentation."""
        training = self.run.training
        return self.epoch_of_run(epoch) % training.views if training.augment else None

    def rate_factor(self, done: int, total: int) -> float:
        """Return the schedule's factor after ``done`` of this round's ``total`` steps."""
        rounds = self.run.federation.rounds
        progress = (self.round - 1 + done / total) / rounds
        return self.rate_scale * learning_rate_factor(self.run.training, progress, rounds)
