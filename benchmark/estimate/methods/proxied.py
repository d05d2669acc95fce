"""Federated methods whose devices hold a smaller proxy of the backbone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

from torch import nn

from benchmark.estimate.memory import image_numbers, peak_bytes
from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods.method import Method
from benchmark.estimate.operations import blocks_flops, embedding_flops, is_tuned, output_flops
from benchmark.estimate.payload import FLOAT_BYTES
from benchmark.estimate.question import Question
from protocol.settings import ProxyKind
from split_model import Head, SplitSettings, SplitSettingsError, Tail, anatomy, state_shapes


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
    output = output_flops(tail, passes=is_tuned(head))
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
