"""Federated full fine-tuning."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from protocol.plan import ProxyKind
from sfprompt_bench.cost.flops import (
    blocks_flops,
    embedding_flops,
    forward_flops,
    is_tuned,
    output_flops,
)
from sfprompt_bench.cost.method_cost import MethodCost
from sfprompt_bench.cost.question import Question
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
from sfprompt_bench.estimate.methods.base import Method
from split_model import Head, SplitSettings, SplitSettingsError, Tail, anatomy, state_shapes
from split_model.proxies.neurons import neurons_shape


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
        sizes, whole = anatomy(settings), part_numbers(settings).backbone
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


class FullFineTuning(WholeModelMethod):
    """FedAvg of the whole model (arXiv 1602.05629): 2|W| a round, 3x forward a visit."""

    name = "fl-full"

    def trained(self, settings: SplitSettings) -> int:
        return parameter_counts(settings).total

    def sent_per_round(self, settings: SplitSettings) -> int:
        return part_numbers(settings).backbone  # buffers are part of the state too

    def visit_flops(self, settings: SplitSettings) -> int:
        return 3 * forward_flops(settings).whole

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return trained_blocks(settings, sizes.depth, sizes.tokens)


_NARROWING = 8


class FedPeftAdapter(WholeModelMethod):
    """FedPEFT-Adapter (arXiv 2210.01708): one bottleneck D -> D/8 -> D, and the classifier.

    All blocks share the bottleneck; it acts on every token behind each of them. A visit is a
    forward pass, the gradient of the inputs back to the end of the first block, and a full
    backward pass of each use of the bottleneck and of the classifier.
    """

    name = "fedpeft-adapter"

    def trained(self, settings: SplitSettings) -> int:
        return parameter_counts(settings).classifier + self.added(settings)

    def added(self, settings: SplitSettings) -> int:
        width, narrow = self._widths(settings)
        return 2 * width * narrow + narrow + width

    def visit_flops(self, settings: SplitSettings) -> int:
        sizes, flops = anatomy(settings), forward_flops(settings)
        width, narrow = self._widths(settings)
        adapters = sizes.depth * sizes.tokens * 2 * (2 * width * narrow)
        passed = flops.after_embedding - flops.block
        return flops.whole + passed + parameter_counts(settings).classifier_flops + 3 * adapters

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        width, narrow = self._widths(settings)
        # Of each use: its input, and the bottleneck on both sides of the activation function.
        adapters = sizes.depth * sizes.tokens * (width + 2 * narrow)
        return passed_blocks(settings, sizes.depth, sizes.tokens) + adapters

    def _widths(self, settings: SplitSettings) -> tuple[int, int]:
        width = anatomy(settings).width
        return width, width // _NARROWING


class FedPeftBias(WholeModelMethod):
    """FedPEFT-Bias (arXiv 2210.01708): every bias of the model, and the classifier.

    A visit is a forward pass, the gradient of the inputs back to the patch embedding's bias, and
    the gradient of the classifier's weights. That of a bias is a sum and counts nothing.
    """

    name = "fedpeft-bias"

    def trained(self, settings: SplitSettings) -> int:
        own = parameter_counts(settings)
        return own.classifier + own.other_biases

    def visit_flops(self, settings: SplitSettings) -> int:
        flops = forward_flops(settings)
        return flops.whole + flops.after_embedding + parameter_counts(settings).classifier_flops

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return passed_blocks(settings, sizes.depth, sizes.tokens)


class FedPeftHead(WholeModelMethod):
    """FedPEFT's "head-tuning" (arXiv 2210.01708): the classifier, on frozen features.

    A visit is a forward pass and the gradient of the classifier's weights.
    """

    name = "fedpeft-head"

    def trained(self, settings: SplitSettings) -> int:
        return parameter_counts(settings).classifier

    def visit_flops(self, settings: SplitSettings) -> int:
        return forward_flops(settings).whole + parameter_counts(settings).classifier_flops

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return run_blocks(settings, sizes.depth, sizes.tokens)


_PROMPTS = 10  # ahead of each block, whatever the run's own prompts are


class FedPeftPrompt(WholeModelMethod):
    """FedPEFT-Prompt (arXiv 2210.01708): VPT-Deep (arXiv 2203.12119), and the classifier.

    Ten fresh tokens stand ahead of every block. A visit is a forward pass with them, the gradient
    of the inputs back to the first block's prompts, and that of the classifier's weights.
    """

    name = "fedpeft-prompt"

    def trained(self, settings: SplitSettings) -> int:
        return parameter_counts(settings).classifier + self.added(settings)

    def added(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return sizes.depth * _PROMPTS * sizes.width

    def visit_flops(self, settings: SplitSettings) -> int:
        flops = forward_flops(settings, _PROMPTS)
        return flops.whole + flops.after_embedding + parameter_counts(settings).classifier_flops

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return passed_blocks(settings, sizes.depth, sizes.tokens + _PROMPTS)


class ProxiedMethod(Method):
    """Downloads the proxy to start, then sends and receives LoRA and the classifier, as float32.

    Operations are those of one training step, forward and backward, by torch's counter on the meta
    device, so that narrower MLPs and the way back to the first tuned block count as they are.

    A run that has a proxy of this kind is taken as it is; of any other the backbone is, with a
    proxy as the method's paper has it.

    Attributes:
        proxy: its kind, as ``model.proxy`` names it.
        tuned_ends: blocks at either end that are tuned; 0: all.
    """

    proxy: ClassVar[ProxyKind]
    tuned_ends: ClassVar[int] = 0

    def applies(self, question: Question) -> bool:
        try:
            self.settings(question)
            _step_flops(self.settings(question))
        except SplitSettingsError:
            return False
        return True

    def settings(self, question: Question) -> SplitSettings:
        """The model of the run, whole on the device. Raises as `cost` does."""
        asked = question.split
        if asked.proxy == self.proxy:
            return asked
        proxied = SplitSettings(
            backbone=asked.backbone,
            image_size=asked.image_size,
            num_classes=asked.num_classes,
            model_overrides=asked.model_overrides,
            cut=0,
            prompt_count=0,
            tune="lora",
            lora_ends=self.tuned_ends,
            proxy=self.proxy,
        )
        return dataclasses.replace(proxied, cut=anatomy(proxied).depth)

    def cost(self, question: Question) -> MethodCost:
        settings = self.settings(question)
        trained = sum(map(math.prod, state_shapes(settings).values()))
        numbers = sum(
            tensor.numel()
            for part in (Head(settings), Tail(settings))
            for tensor in part.state_dict().values()
        )
        visits = question.train_samples * question.local_epochs
        return MethodCost(
            trainable_parameters=trained,
            bytes_start=FLOAT_BYTES * numbers,
            bytes_up_per_round=FLOAT_BYTES * trained,
            bytes_down_per_round=FLOAT_BYTES * trained,
            device_flops_per_round=visits * _step_flops(settings),
            device_peak_bytes=peak_bytes(
                numbers,
                trained,
                question.settings.training.batch_size,
                image_numbers(settings) + _activations(settings),
            ),
        )


@functools.lru_cache(maxsize=64)
def _step_flops(settings: SplitSettings) -> int:
    """Of one image's forward and backward pass."""
    head, tail = Head(settings), Tail(settings)
    for part in (head, tail):
        tuned = set(part.tuned().values())
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(name in tuned)
    output = output_flops(tail, needs_gradient=is_tuned(head))
    return embedding_flops(head) + blocks_flops(head) + output


def _activations(settings: SplitSettings) -> int:
    """Numbers kept of one image: of every block that a gradient passes, as of a frozen one.

    With what LoRA keeps beside: the input of its block's projection, and what is between its two
    layers.
    """
    sizes = anatomy(settings)
    kept = sizes.width  # of the last norm
    for block in Head(settings).blocks.values():
        layers: list[Any] = [own for own in block.modules() if isinstance(own, nn.Linear)]
        kept += sizes.width + sum(layer.out_features for layer in layers)
        if any("lora_" in name for name, _ in block.named_parameters()):
            kept += sizes.width + 2 * settings.lora_rank
    return sizes.tokens * kept


_EVERY = 10  # rounds, best in the paper


class FedPft(ProxiedMethod):
    """FedPFT (arXiv 2404.11536): every block, a quarter of the neurons of those between the ends.

    LoRA of rank 8 in all blocks. Every so many rounds, 10 where the run has no such proxy, the
    device tells how often each neuron was inactive, for which it looks at its samples once more,
    and gets a new proxy.
    """

    name = "fedpft"
    proxy: ClassVar[ProxyKind] = "pruned"

    def cost(self, question: Question) -> MethodCost:
        plain, settings = super().cost(question), self.settings(question)
        own = question.split.proxy == self.proxy
        every = question.settings.distillation.every if own else _EVERY
        if not every:
            return plain
        return dataclasses.replace(
            plain,
            bytes_up_per_renewal=FLOAT_BYTES * math.prod(neurons_shape(settings)),
            bytes_down_per_renewal=plain.bytes_start - FLOAT_BYTES * plain.trainable_parameters,
            device_flops_per_renewal=question.train_samples * _forward_flops(settings),
            renew_every=every,
        )


@functools.lru_cache(maxsize=64)
def _forward_flops(settings: SplitSettings) -> int:
    """Of one image through the head, without gradients."""
    head = Head(settings).requires_grad_(False)
    return embedding_flops(head) + blocks_flops(head)


class OffsiteTuning(ProxiedMethod):
    """Offsite-tuning (arXiv 2302.04870): half of the blocks; LoRA of rank 8 in first and last."""

    name = "offsite-tuning"
    proxy: ClassVar[ProxyKind] = "dropped"
    tuned_ends: ClassVar[int] = 1
