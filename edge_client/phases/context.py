"""What every phase of a round works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from edge_client.data import BatchReader, shuffled
from edge_client.device_model import DeviceModel
from edge_client.schedule import learning_rate_factor
from protocol.seeds import derive_seed
from protocol.settings import RunSettings

Advance = Callable[[str, int, int], None]  # phase, batches done, batches in all


@dataclass
class RoundContext:
    """One participant's round: its model, its samples, and the draws that belong to the round."""

    run: RunSettings
    participant: str
    round: int  # from 1
    attempt: int
    model: DeviceModel
    samples: BatchReader
    advance: Advance

    def seed(self, purpose: str) -> int:
        """A seed for one purpose in this round of this participant."""
        return derive_seed(self.run.seed, purpose, self.participant, self.round)

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

    def rate_factor(self, done: int, total: int) -> float:
        """The schedule's factor when ``done`` of ``total`` steps of this round are behind."""
        rounds = self.run.federation.rounds
        progress = (self.round - 1 + done / total) / rounds
        return learning_rate_factor(self.run.training, progress, rounds)
