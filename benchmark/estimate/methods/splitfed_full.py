"""Split-federated full fine-tuning."""

from __future__ import annotations

from benchmark.estimate.memory import image_numbers, peak_bytes, trained_blocks
from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods.method import Method
from benchmark.estimate.payload import FLOAT_BYTES
from benchmark.estimate.question import Question
from benchmark.estimate.sizes import bytes_of, forward_flops, parameters
from split_model import anatomy


class SplitFedFull(Method):
    """SplitFed (arXiv 2004.12088) in U-shape: head and tail are trained and averaged too.

    All samples cross in every split epoch, as float32: smashed data up, features down and their
    gradients back, 4q a visit. Head and tail cross both ways each round. The server trains a body
    for each device, so all parameters are tuned.
    """

    name = "splitfed-full"

    def cost(self, question: Question) -> MethodCost:
        settings, training = question.unmerged, question.settings.training
        sizes, numbers = anatomy(settings), bytes_of(settings)
        flops = forward_flops(settings)
        device = numbers.head + numbers.tail
        stream = sizes.tokens * sizes.width
        visits = question.train_samples * training.split_epochs
        each_way = FLOAT_BYTES * (device + 2 * visits * stream)
        blocks = settings.cut + settings.tail_blocks
        forward = flops.embedding + blocks * flops.block + flops.output
        activations = (
            image_numbers(settings)
            + trained_blocks(settings, blocks, sizes.tokens)
            + 4 * stream  # smashed data, features, their gradients
        )
        return MethodCost(
            trainable_parameters=parameters(settings).every,
            bytes_start=FLOAT_BYTES * device,
            bytes_up_per_round=each_way,
            bytes_down_per_round=each_way,
            device_flops_per_round=visits * 3 * forward,
            device_peak_bytes=peak_bytes(device, device, training.batch_size, activations),
        )
