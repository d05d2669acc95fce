"""FedPFT and offsite-tuning: devices train a proxy, and the result goes into the backbone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

from torch import nn

from protocol.errors import InvalidField
from protocol.parts import BackboneSettings
from protocol.plan import ModelPlan
from protocol.settings import RunSettings
from sfprompt_bench.cost.flops import blocks_flops, embedding_flops, is_tuned, output_flops
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.cost.sizes import FLOAT_BYTES, image_numbers, peak_bytes
from sfprompt_bench.methods.base import FLOAT32, FederatedMethod
from sfprompt_bench.presets import Changes
from split_model.backbone.architecture import anatomy
from split_model.checkpoints.state import state_shapes
from split_model.parts.head import Head
from split_model.parts.tail import Tail
from tuning_methods.fedpft.settings import FedPFT as FedPftSettings
from tuning_methods.proxies.neurons import neurons_shape
from tuning_methods.proxies.settings import distillation_of


class ProxiedMethod(FederatedMethod):
    """Downloads the proxy to start, then sends and receives LoRA and the classifier, as float32.

    The whole proxy is the head. A comparison shows the backbone's accuracy; devices measure the
    proxy's.

    Operations are those of one training step, forward and backward, counted on the meta device,
    so that narrower MLPs and a backward pass to the first tuned block count as they are.
    """

    fixed: ClassVar[Changes] = {"wire": FLOAT32}
    shape_field: ClassVar[str]  # the field of `ModelPlan` with the proxy's shape

    def is_applicable(self, question: Question) -> bool:
        try:
            _step_flops(self.model(question))
        except InvalidField:
            return False
        return True

    def model(self, question: Question) -> ModelPlan:
        """The proxy of the question's run, or that of the method's defaults if it has none.

        Raises as `cost` does.
        """
        run = question.split
        if getattr(run, self.shape_field):
            return run
        backbone = {field: getattr(run, field) for field in BackboneSettings.model_fields}
        own = RunSettings.model_validate({"model": backbone, "method": {"name": self.tuning}})
        return own.plan.model

    def cost(self, question: Question) -> MethodCost:
        settings = self.model(question)
        trained = sum(map(math.prod, state_shapes(settings).values()))
        numbers = _device_numbers(settings)
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
                question.plan.training.batch_size,
                image_numbers(settings) + _activations(settings),
            ),
        )


class FedPft(ProxiedMethod):
    """FedPFT (arXiv 2404.11536): LoRA on a proxy with pruned MLPs, distilled before the run.

    Every block stays, those between the ends with a quarter of their neurons. LoRA of rank 8 is on
    the queries and values of all blocks, and the classifier is tuned. After every tenth round, but
    not the last, devices report how often each neuron was inactive, which takes a forward pass of
    their samples; the server distils the half of the neurons used least again, and devices
    download the new proxy.
    """

    name = "fedpft"
    what = (
        "FedPFT: LoRA on a proxy with pruned MLPs, distilled before the run and again every 10 "
        "rounds; its accuracy in the backbone"
    )
    tuning = "fedpft"
    shape_field = "mlp_widths"

    def cost(self, question: Question) -> MethodCost:
        plain, settings = super().cost(question), self.model(question)
        in_run = bool(question.split.mlp_widths)
        distillation = distillation_of(question.plan) if in_run else FedPftSettings().distillation
        interval = distillation.every
        if not interval:
            return plain
        return dataclasses.replace(
            plain,
            bytes_up_per_renewal=FLOAT_BYTES * math.prod(neurons_shape(settings)),
            bytes_down_per_renewal=plain.bytes_start - FLOAT_BYTES * plain.trainable_parameters,
            device_flops_per_renewal=question.train_samples * _head_flops(settings),
            renew_every=interval,
        )


class OffsiteTuning(ProxiedMethod):
    """Offsite-tuning (arXiv 2302.04870): the blocks at both ends are tuned, others dropped evenly.

    The adapters are the first and the last blocks, here with LoRA of rank 8 on their queries and
    values, and the classifier. The emulator between them is half of the backbone's blocks and is
    not distilled.
    """

    name = "offsite-tuning"
    what = "offsite-tuning: LoRA on the end blocks, fewer blocks between; accuracy in the backbone"
    tuning = "offsite-tuning"
    shape_field = "blocks"


@functools.lru_cache(maxsize=64)
def _step_flops(settings: ModelPlan) -> int:
    """Count one image's forward and backward pass."""
    head, tail = Head(settings), Tail(settings)
    for part in (head, tail):
        tuned = set(part.tuned().values())
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(name in tuned)
    output = output_flops(tail, needs_gradient=is_tuned(head))
    return embedding_flops(head) + blocks_flops(head) + output


@functools.lru_cache(maxsize=64)
def _head_flops(settings: ModelPlan) -> int:
    """Count one image's forward pass through the head, without gradients."""
    head = Head(settings).requires_grad_(False)
    return embedding_flops(head) + blocks_flops(head)


@functools.lru_cache(maxsize=64)
def _device_numbers(settings: ModelPlan) -> int:
    """Count the numbers in head and tail."""
    parts = (Head(settings), Tail(settings))
    return sum(tensor.numel() for part in parts for tensor in part.state_dict().values())


@functools.lru_cache(maxsize=64)
def _activations(settings: ModelPlan) -> int:
    """Count what autograd keeps of one image: of every block as of a frozen one, plus LoRA's.

    LoRA keeps the input of its block's projection and the output of its first layer.
    """
    sizes = anatomy(settings)
    per_token = sizes.width  # of the last norm
    for block in Head(settings).blocks.values():
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        per_token += sizes.width + sum(layer.out_features for layer in layers)
        if any("lora_" in name for name, _ in block.named_parameters()):
            per_token += sizes.width + 2 * settings.lora_rank
    return sizes.tokens * per_token
