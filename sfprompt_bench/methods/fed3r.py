"""Fed3R: the whole model on the device, one round, and a classifier in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from protocol.plan import ModelPlan
from sfprompt_bench.cost.flops import forward_flops
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.cost.sizes import FLOAT_BYTES, parameter_counts, run_blocks, uncut_settings
from sfprompt_bench.methods.base import FLOAT32
from sfprompt_bench.methods.whole_model import WholeModelMethod, pretrained_model
from sfprompt_bench.presets import Changes
from split_model.backbone.architecture import anatomy
from tuning_methods.fed3r.sums import sums_shapes


class Fed3R(WholeModelMethod):
    """Fed3R (arXiv 2406.01116): the products of features with each other and with the classes.

    A visit is a forward pass up to the classifier, and the products of its input. They are sent
    once. The classifier crosses both ways, as in other methods. The memory is that of
    `FedPeftHead`, with the sums in float64.
    """

    name = "fed3r"
    what = "Fed3R: ridge regression on frozen features, solved from sums of all devices"
    tuning = "fed3r"
    fixed: ClassVar[Changes] = {"federation": {"rounds": 1, "evaluate_every": 1}, "wire": FLOAT32}

    def is_applicable(self, question: Question) -> bool:
        settings = uncut_settings(pretrained_model(question.plan.model))
        counts = parameter_counts(settings)
        return counts.classifier == counts.classifier_weights + settings.num_classes and (
            anatomy(settings).num_tokens != 2  # two classifiers
        )

    def trained_numbers(self, settings: ModelPlan) -> int:
        return parameter_counts(settings).classifier

    def visit_flops(self, settings: ModelPlan) -> int:
        counts, rows = parameter_counts(settings), _classifier_width(settings) + 1
        return forward_flops(settings).whole - counts.classifier_flops + 2 * rows**2

    def activations(self, settings: ModelPlan) -> int:
        sizes = anatomy(settings)
        return run_blocks(settings, sizes.depth, sizes.tokens)

    def cost(self, question: Question) -> MethodCost:
        settings = uncut_settings(pretrained_model(question.plan.model))
        cost = super().cost(replace(question, local_epochs=1))
        rows, classes = _classifier_width(settings) + 1, settings.num_classes
        sums = sums_shapes(rows - 1, classes).values()
        return replace(
            cost,
            bytes_up_once=FLOAT_BYTES * sum(math.prod(shape) for shape in sums),
            device_flops_per_round=0,
            device_flops_once=cost.device_flops_per_round,
            # No gradients and moments; sums of 8 bytes a number.
            device_peak_bytes=cost.device_peak_bytes
            - 3 * FLOAT_BYTES * cost.trainable_parameters
            + 2 * FLOAT_BYTES * rows * (rows + classes),
        )


def _classifier_width(settings: ModelPlan) -> int:
    return parameter_counts(settings).classifier_weights // settings.num_classes
