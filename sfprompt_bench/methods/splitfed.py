"""SplitFed in U-shape: head and tail on the device, the body on the server."""

from __future__ import annotations

from typing import ClassVar

from sfprompt_bench.cost.flops import forward_flops
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.cost.sizes import (
    FLOAT_BYTES,
    image_numbers,
    parameter_counts,
    part_numbers,
    passed_blocks,
    peak_bytes,
    run_blocks,
    trained_blocks,
)
from sfprompt_bench.methods.base import FLOAT32, FederatedMethod
from sfprompt_bench.presets import Changes
from split_model.backbone.architecture import anatomy


class SplitFed(FederatedMethod):
    """SplitFed (arXiv 2004.12088) in U-shape, in float32, on all samples."""

    tuning = "splitfed"


class SplitFedFull(SplitFed):
    """Nothing is frozen.

    The server trains a body for each participant during a round, and averages the bodies at its
    end as it averages heads and tails.

    All samples cross in every split epoch, as float32: smashed data up, features down and their
    gradients back, 4q a visit. Head and tail cross both ways in each round.
    """

    name = "splitfed-full"
    what = "U-shaped SplitFed: head, body and tail are trained, all are averaged, float32"
    fixed: ClassVar[Changes] = {"method": {"tune": "full"}, "wire": FLOAT32}

    def cost(self, question: Question) -> MethodCost:
        settings, training = question.unmerged, question.plan.training
        sizes, numbers = anatomy(settings), part_numbers(settings)
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
            trainable_parameters=parameter_counts(settings).total,
            bytes_start=FLOAT_BYTES * device,
            bytes_up_per_round=each_way,
            bytes_down_per_round=each_way,
            device_flops_per_round=visits * 3 * forward,
            device_peak_bytes=peak_bytes(device, device, training.batch_size, activations),
        )


class SplitFedLinear(SplitFed):
    """Head and body are frozen, and the tail's classifier is tuned.

    All samples cross in every split epoch, as float32: smashed data up and features down. No
    gradient crosses, as nothing before the tail is tuned. The classifier crosses both ways in each
    round.
    """

    name = "splitfed-linear"
    what = "U-shaped SplitFed with frozen head and body: the tail alone is tuned, float32"
    fixed: ClassVar[Changes] = {"method": {"tune": "linear"}, "wire": FLOAT32}

    def cost(self, question: Question) -> MethodCost:
        settings, training = question.unmerged, question.plan.training
        sizes, numbers = anatomy(settings), part_numbers(settings)
        flops, counts = forward_flops(settings), parameter_counts(settings)
        stream = sizes.tokens * sizes.width
        visits = question.train_samples * training.split_epochs
        # The tail passes the gradient of the features on, and trains its classifier.
        head = flops.embedding + settings.cut * flops.block
        tail = settings.tail_blocks * flops.block + flops.output
        visit_flops = head + 2 * tail + counts.classifier_flops
        activations = (
            image_numbers(settings)
            + run_blocks(settings, settings.cut, sizes.tokens)
            + passed_blocks(settings, settings.tail_blocks, sizes.tokens)
            + 3 * stream  # smashed data, features, their gradient
        )
        device = numbers.head + numbers.tail
        each_way = FLOAT_BYTES * (counts.classifier + visits * stream)
        return MethodCost(
            trainable_parameters=counts.classifier,
            bytes_start=FLOAT_BYTES * device,
            bytes_up_per_round=each_way,
            bytes_down_per_round=each_way,
            device_flops_per_round=visits * visit_flops,
            device_peak_bytes=peak_bytes(
                device, counts.classifier, training.batch_size, activations
            ),
        )
