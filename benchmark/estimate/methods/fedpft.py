"""FedPFT."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

from benchmark.estimate.method_cost import MethodCost
from benchmark.estimate.methods.proxied import ProxiedMethod
from benchmark.estimate.operations import blocks_flops, embedding_flops
from benchmark.estimate.payload import FLOAT_BYTES
from benchmark.estimate.question import Question
from protocol.settings import ProxyKind
from split_model import Head, SplitSettings
from split_model.neurons import neurons_shape

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
