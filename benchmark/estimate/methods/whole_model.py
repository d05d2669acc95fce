"""Federated methods without a split: the device holds the whole model."""

from __future__ import annotations

from abc import abstractmethod

from benchmark.estimate.memory import image_numbers, peak_bytes
from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods.method import Method
from benchmark.estimate.payload import FLOAT_BYTES
from benchmark.estimate.question import Question
from benchmark.estimate.sizes import bytes_of
from split_model import SplitSettings, anatomy


class WholeModelMethod(Method):
    """Downloads the whole model to start, then sends and receives what it tunes, as float32.

    Nothing of the samples crosses. A round is ``local_epochs`` passes over all samples.
    """

    @abstractmethod
    def trained(self, settings: SplitSettings) -> int:
        """Numbers that are tuned, and sent both ways every round."""

    @abstractmethod
    def visit_flops(self, settings: SplitSettings) -> int:
        """Operations of training on one image once."""

    @abstractmethod
    def activations(self, settings: SplitSettings) -> int:
        """Numbers kept of one image between the embedding and the classifier's norm."""

    def added(self, settings: SplitSettings) -> int:
        """Of the tuned numbers, those that the pretrained model does not have."""
        return 0

    def sent_per_round(self, settings: SplitSettings) -> int:
        """Numbers that cross each way in a round."""
        return self.trained(settings)

    def cost(self, question: Question) -> MethodCost:
        settings = question.unmerged
        sizes, whole = anatomy(settings), bytes_of(settings).backbone
        sent = FLOAT_BYTES * self.sent_per_round(settings)
        visits = question.train_samples * question.local_epochs
        kept = image_numbers(settings) + self.activations(settings) + sizes.tokens * sizes.width
        return MethodCost(
            trainable_parameters=self.trained(settings),
            bytes_start=FLOAT_BYTES * whole,
            bytes_up_per_round=sent,
            bytes_down_per_round=sent,
            device_flops_per_round=visits * self.visit_flops(settings),
            device_peak_bytes=peak_bytes(
                whole + self.added(settings),
                self.trained(settings),
                question.settings.training.batch_size,
                kept,
            ),
        )
