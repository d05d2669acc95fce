"""Split-federated tuning of the classifier."""

from __future__ import annotations

from benchmark.estimate.memory import image_numbers, passed_blocks, peak_bytes, run_blocks
from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods.method import Method
from benchmark.estimate.payload import FLOAT_BYTES
from benchmark.estimate.question import Question
from benchmark.estimate.sizes import bytes_of, forward_flops, parameters
from split_model import anatomy


class SplitFedLinear(Method):
    """SplitFed (arXiv 2004.12088) in U-shape with everything frozen but the classifier.

    All samples cross in every split epoch, as float32, in two legs: smashed data up and features
    down. No gradient crosses, as nothing is tuned ahead of the tail. The classifier crosses both
    ways each round.
    """

    name = "splitfed-linear"

    def cost(self, question: Question) -> MethodCost:
        settings, training = question.unmerged, question.settings.training
        sizes, numbers = anatomy(settings), bytes_of(settings)
        flops = forward_flops(settings)
        own = parameters(settings)
        stream = sizes.tokens * sizes.width
        visits = question.train_samples * training.split_epochs
        # The tail passes the gradient of the features on, and trains its classifier.
        head = flops.embedding + settings.cut * flops.block
        tail = settings.tail_blocks * flops.block + flops.output
        visit_flops = head + 2 * tail + own.classifier_flops
        activations = (
            image_numbers(settings)
            + run_blocks(settings, settings.cut, sizes.tokens)
            + passed_blocks(settings, settings.tail_blocks, sizes.tokens)
            + 3 * stream  # smashed data, features, their gradient
        )
        device = numbers.head + numbers.tail
        each_way = FLOAT_BYTES * (own.classifier + visits * stream)
        return MethodCost(
            trainable_parameters=own.classifier,
            bytes_start=FLOAT_BYTES * device,
            bytes_up_per_round=each_way,
            bytes_down_per_round=each_way,
            device_flops_per_round=visits * visit_flops,
            device_peak_bytes=peak_bytes(device, own.classifier, training.batch_size, activations),
        )
