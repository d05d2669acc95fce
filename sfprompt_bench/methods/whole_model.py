"""Federated full fine-tuning and FedPEFT: the whole model is on the device."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from protocol.plan import ModelPlan
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
    uncut_settings,
)
from sfprompt_bench.methods.base import FLOAT32, FederatedMethod
from sfprompt_bench.presets import Changes
from split_model.backbone.architecture import anatomy
from tuning_methods.fedpeft.settings import NARROWING


def pretrained_model(model: ModelPlan) -> ModelPlan:
    """The backbone with the run's image size and classes, and nothing of the run's method."""
    return ModelPlan(
        backbone=model.backbone,
        image_size=model.image_size,
        num_classes=model.num_classes,
        prompt_count=0,
        cut=0,
    )


class WholeModelMethod(FederatedMethod):
    """Downloads the whole model to start, then sends and receives what it tunes, as float32.

    Nothing of the samples crosses. A round is ``local_epochs`` passes over all samples.
    """

    @abstractmethod
    def trained_numbers(self, settings: ModelPlan) -> int:
        """Numbers that are tuned, and sent both ways in every round."""

    @abstractmethod
    def visit_flops(self, settings: ModelPlan) -> int:
        """Operations of training on one image once."""

    @abstractmethod
    def activations(self, settings: ModelPlan) -> int:
        """Numbers that autograd keeps of one image from the embedding to the classifier's norm."""

    def added_numbers(self, settings: ModelPlan) -> int:
        """The tuned numbers that the pretrained model does not have."""
        return 0

    def sent_numbers(self, settings: ModelPlan) -> int:
        """Numbers that cross in each direction in a round."""
        return self.trained_numbers(settings)

    def cost(self, question: Question) -> MethodCost:
        settings = uncut_settings(pretrained_model(question.plan.model))
        sizes, whole = anatomy(settings), part_numbers(settings).backbone
        sent = FLOAT_BYTES * self.sent_numbers(settings)
        visits = question.train_samples * question.local_epochs
        features = sizes.tokens * sizes.width
        return MethodCost(
            trainable_parameters=self.trained_numbers(settings),
            bytes_start=FLOAT_BYTES * whole,
            bytes_up_per_round=sent,
            bytes_down_per_round=sent,
            device_flops_per_round=visits * self.visit_flops(settings),
            device_peak_bytes=peak_bytes(
                whole + self.added_numbers(settings),
                self.trained_numbers(settings),
                question.plan.training.batch_size,
                image_numbers(settings) + self.activations(settings) + features,
            ),
        )


class FullFineTuning(WholeModelMethod):
    """FedAvg of the whole model (arXiv 1602.05629): 2|W| a round, 3x forward a visit."""

    name = "fl-full"
    what = "federated full fine-tuning: every weight is trained on the device and averaged"
    tuning = "fedavg"
    fixed: ClassVar[Changes] = {"wire": FLOAT32}

    def trained_numbers(self, settings: ModelPlan) -> int:
        return parameter_counts(settings).total

    def sent_numbers(self, settings: ModelPlan) -> int:
        return part_numbers(settings).backbone  # buffers are part of the state too

    def visit_flops(self, settings: ModelPlan) -> int:
        return 3 * forward_flops(settings).whole

    def activations(self, settings: ModelPlan) -> int:
        sizes = anatomy(settings)
        return trained_blocks(settings, sizes.depth, sizes.tokens)


class FedPeftAdapter(WholeModelMethod):
    """FedPEFT-Adapter (arXiv 2210.01708): one bottleneck D -> D/8 -> D, and the classifier.

    All blocks share the bottleneck; it acts on every token after each of them. A visit is a
    forward pass, the gradient of the inputs back to the end of the first block, and a full
    backward pass of each use of the bottleneck and of the classifier.
    """

    name = "fedpeft-adapter"
    what = "FedPEFT: one bottleneck after every block, and the classifier"
    tuning = "fedpeft"
    # A width of 0 is an eighth of the backbone's.
    fixed: ClassVar[Changes] = {"method": {"tune": "adapter", "adapter_width": 0}, "wire": FLOAT32}

    def trained_numbers(self, settings: ModelPlan) -> int:
        return parameter_counts(settings).classifier + self.added_numbers(settings)

    def added_numbers(self, settings: ModelPlan) -> int:
        width, narrow = self._widths(settings)
        return 2 * width * narrow + narrow + width

    def visit_flops(self, settings: ModelPlan) -> int:
        sizes, flops = anatomy(settings), forward_flops(settings)
        width, narrow = self._widths(settings)
        adapters = sizes.depth * sizes.tokens * 2 * (2 * width * narrow)
        passed = flops.after_embedding - flops.block
        return flops.whole + passed + parameter_counts(settings).classifier_flops + 3 * adapters

    def activations(self, settings: ModelPlan) -> int:
        sizes = anatomy(settings)
        width, narrow = self._widths(settings)
        # Of each use: its input, and the bottleneck on both sides of the activation function.
        adapters = sizes.depth * sizes.tokens * (width + 2 * narrow)
        return passed_blocks(settings, sizes.depth, sizes.tokens) + adapters

    def _widths(self, settings: ModelPlan) -> tuple[int, int]:
        width = anatomy(settings).width
        return width, width // NARROWING


class FedPeftBias(WholeModelMethod):
    """FedPEFT-Bias (arXiv 2210.01708): all biases of the model, and the classifier.

    A visit is a forward pass, the gradient of the inputs back to the patch embedding's bias, and
    the gradient of the classifier's weights. A bias's gradient is a sum and counts nothing.
    """

    name = "fedpeft-bias"
    what = "FedPEFT: all biases and the classifier"
    tuning = "fedpeft"
    fixed: ClassVar[Changes] = {"method": {"tune": "bias"}, "wire": FLOAT32}

    def trained_numbers(self, settings: ModelPlan) -> int:
        counts = parameter_counts(settings)
        return counts.classifier + counts.other_biases

    def visit_flops(self, settings: ModelPlan) -> int:
        flops = forward_flops(settings)
        return flops.whole + flops.after_embedding + parameter_counts(settings).classifier_flops

    def activations(self, settings: ModelPlan) -> int:
        sizes = anatomy(settings)
        return passed_blocks(settings, sizes.depth, sizes.tokens)


class FedPeftHead(WholeModelMethod):
    """FedPEFT's "head-tuning" (arXiv 2210.01708): the classifier, on frozen features.

    A visit is a forward pass and the gradient of the classifier's weights.
    """

    name = "fedpeft-head"
    what = "FedPEFT: the classifier alone, the whole frozen model on the device"
    tuning = "fedpeft"
    fixed: ClassVar[Changes] = {"method": {"tune": "classifier"}, "wire": FLOAT32}

    def trained_numbers(self, settings: ModelPlan) -> int:
        return parameter_counts(settings).classifier

    def visit_flops(self, settings: ModelPlan) -> int:
        return forward_flops(settings).whole + parameter_counts(settings).classifier_flops

    def activations(self, settings: ModelPlan) -> int:
        sizes = anatomy(settings)
        return run_blocks(settings, sizes.depth, sizes.tokens)


class FedPeftPrompt(WholeModelMethod):
    """FedPEFT-Prompt (arXiv 2210.01708): VPT-Deep (arXiv 2203.12119), and the classifier.

    Ten new tokens precede every block, whatever the run's own prompts are. A visit is a forward
    pass with them, the gradient of the inputs back to the first block's prompts, and that of the
    classifier's weights.
    """

    name = "fedpeft-prompt"
    what = "FedPEFT: ten prompts before every block, and the classifier"
    tuning = "fedpeft"
    prompts: ClassVar[int] = 10
    fixed: ClassVar[Changes] = {
        "method": {"tune": "prompt", "prompt_count": prompts},
        "wire": FLOAT32,
    }

    def trained_numbers(self, settings: ModelPlan) -> int:
        return parameter_counts(settings).classifier + self.added_numbers(settings)

    def added_numbers(self, settings: ModelPlan) -> int:
        sizes = anatomy(settings)
        return sizes.depth * self.prompts * sizes.width

    def visit_flops(self, settings: ModelPlan) -> int:
        flops = forward_flops(settings, self.prompts)
        return flops.whole + flops.after_embedding + parameter_counts(settings).classifier_flops

    def activations(self, settings: ModelPlan) -> int:
        sizes = anatomy(settings)
        return passed_blocks(settings, sizes.depth, sizes.tokens + self.prompts)
