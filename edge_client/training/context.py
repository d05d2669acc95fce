"""The context of a round's phases: run, model, samples and random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from edge_client.data.batches import BatchReader, shuffled
from edge_client.data.image_set import Labels
from edge_client.model import Floats, Model
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.smashed.uploads import SampleUploader
from edge_client.transport.split_client import Ids, SamplesMissing
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from split_model.linear_fit import Features

if TYPE_CHECKING:
    import torch

    from edge_client.training.proximal import Proximal

R = TypeVar("R")

Advance = Callable[[str, int, int], None]  # phase, batches done, batches in total

_MAX_UPLOADS = 3  # uploads of missing samples; then the request carries the smashed data itself


class Diverged(Exception):
    """A loss, a gradient or a tuned parameter is not finite: training cannot continue."""


@dataclass
class FeatureCache:
    """The features of all samples of a set, as the server sent them.

    Attributes:
        attempt: at round 0 whose basis they have.
        decay: of the tail in later rounds, see `tune_classifier`.
        fitted: attempt at round 0, and the decay that this device computed in it.
    """

    features: Features | None = None
    attempt: int | None = None
    decay: float = 0.0
    fitted: tuple[int, float] | None = None


@dataclass(frozen=True)
class Samples:
    """One set of the device's samples, with its caches.

    Attributes:
        images: reader of the images.
        outputs: cache of the head's outputs; None: they are not constant (prompts at the input).
        uploader: sends smashed data to the server's cache; None: the run has no such cache.
        features: features of round 0, in a run that has one.
    """

    images: BatchReader
    outputs: HeadOutputs | None = None
    uploader: SampleUploader | None = None
    features: FeatureCache = field(default_factory=FeatureCache)

    def __len__(self) -> int:
        return len(self.images)

    def request_with_batch(
        self, positions: Labels, view: int | None, request: Callable[[Floats | Ids], R]
    ) -> R:
        """Send a request of the split plane for a batch of samples.

        If the server caches samples, the request names them by id. Missing samples are uploaded,
        and the request is repeated. If the server cannot cache one batch, the request carries the
        smashed data itself.

        Args:
            positions: positions of the samples, int64 [b].
            view: augmented view; None: no augmentation.
            request: sends ids, uint8 [b, 16], or smashed data [b, T, D].

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
    """One participant's round: model, samples and random draws."""

    run: RunPlan
    participant: str
    round: int  # at least `RunPlan.first_round`
    attempt: int
    model: Model
    samples: Samples
    advance: Advance
    cache_bytes: int  # memory budget of the tuning method's cache
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
        """Return the generator of a step's stochastic rounding; None: the run rounds to nearest."""
        if not self.run.wire.stochastic_rounding:
            return None
        import torch  # only runs with gradients have steps

        seed = derive_seed(self.run.seed, "rounding", self.participant, self.round, step)
        return torch.Generator().manual_seed(seed)

    def batches(self, purpose: str, selected: Labels, epochs: int) -> Iterator[tuple[int, Labels]]:
        """Yield (epoch, sample positions [b]) over ``selected`` [k], shuffled in every epoch."""
        size, seed = self.run.training.batch_size, self.seed(purpose)
        total, done = epochs * -(-len(selected) // size), 0
        for epoch in range(epochs):
            for order in shuffled(len(selected), size, seed, epoch):
                yield epoch, selected[order]
                done += 1
                self.advance(purpose, done, total)

    def epoch_of_run(self, epoch: int) -> int:
        """Return the number of an epoch over all rounds; split epochs follow local ones."""
        training = self.run.training
        return (self.round - 1) * (training.local_epochs + training.split_epochs) + epoch

    def view(self, epoch: int) -> int | None:
        """Return the augmented view that this round's epoch uses; None: no augmentation."""
        training = self.run.training
        return self.epoch_of_run(epoch) % training.views if training.augment else None

    def rate_factor(self, done: int, total: int) -> float:
        """Return the learning rates' factor after ``done`` of this round's ``total`` steps."""
        from split_model.optimizer import learning_rate_factor  # imports torch

        rounds = self.run.federation.rounds
        progress = (self.round - 1 + done / total) / rounds
        return self.rate_scale * learning_rate_factor(self.run.training, progress, rounds)
