"""Layer-wise distillation: smaller blocks learn to reproduce the backbone's layers.

The backbone is the teacher T, the proxy the student S. The loss is the mean over the layers of

    |h_T - h_S|^2 / RMS(h_T)^2 + alpha |f_T - f_S|^2 / RMS(f_T)^2

where h is a block's output, f its MLP's output, and squares are means over all elements. The images
are not the devices'. Tensors that the proxy shares with the backbone stay frozen, because the tuned
state is inserted into the backbone later.

Between rounds, the neurons that devices use least are distilled again with the same loss. Teacher
and student then both contain the tuned state.

Source: FedPFT (arXiv 2404.11536, section 3.3).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from protocol.seeds import derive_seed
from split_model.backbone.architecture import anatomy, kept_blocks
from split_model.checkpoints.state import PROMPTS, head_tensors
from split_model.layers.adapters import lora_blocks
from split_model.parts.base import Part
from split_model.parts.build import Layered, build_head
from split_model.parts.head import Head
from tuning_methods.proxies.neurons import (
    freeze_neurons,
    pruned_mlps,
    select_retained_neurons,
)
from tuning_methods.proxies.settings import DistillationSettings
from tuning_methods.proxies.weights import (
    backbone_plan,
    insert_into_backbone,
    narrowed_blocks,
    proxy_weights,
)

log = logging.getLogger(__name__)

BlockPairs = Sequence[tuple[str, str]]  # a teacher's block, and the student's that replaces it


@dataclasses.dataclass(frozen=True)
class Trace:
    """The outputs [B, T, D] of each block and of its MLP, by the block's number."""

    blocks: dict[str, Tensor]
    mlps: dict[str, Tensor]


def trace_layers(part: Part, inputs: Tensor, prompts: Tensor | None = None) -> Trace:
    """Run a part forward and record the outputs of its blocks and their MLPs.

    Args:
        part: a head or a body.
        inputs: images [B, 3, S, S] for a head, tokens [B, T, D] for a body.
        prompts: [P, D], for a head only; None: none.
    """
    trace = Trace({}, {})

    def record(outputs: dict[str, Tensor], number: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            outputs[number] = output

        return hook

    handles = []
    for number, block in part.blocks.items():
        handles.append(block.register_forward_hook(record(trace.blocks, number)))
        mlp = block.get_submodule("mlp")
        handles.append(mlp.register_forward_hook(record(trace.mlps, number)))
    try:
        part(inputs) if prompts is None else part(inputs, prompts)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def layer_loss(teacher: Trace, student: Trace, pairs: BlockPairs, mlp_weight: float) -> Tensor:
    """Compute the module's loss, a scalar; ``mlp_weight`` is its alpha."""
    terms = [
        _relative_error(teacher.blocks[source], student.blocks[replacement])
        + mlp_weight * _relative_error(teacher.mlps[source], student.mlps[replacement])
        for source, replacement in pairs
    ]
    return torch.stack(terms).mean()


def _relative_error(target: Tensor, output: Tensor) -> Tensor:
    scale = target.square().mean().clamp_min(torch.finfo(target.dtype).tiny)
    return (target - output).square().mean() / scale


def distil_proxy(
    settings: ModelPlan,
    weights: Mapping[str, Tensor],
    images: Tensor,
    distillation: DistillationSettings,
    seed: int,
) -> dict[str, Tensor]:
    """Make a proxy from its backbone, and distil it if ``distillation.epochs`` is above 0.

    A proxy with narrower MLPs trains these, one with fewer blocks the blocks without LoRA. A block
    reproduces the backbone's blocks from the one that it copies to the last before the next copy.

    Args:
        settings: the model's plan, with a proxy.
        weights: the backbone's, by timm's names.
        images: [N, 3, S, S], preprocessed for the backbone.
        distillation: epochs, batch size and learning rate.
        seed: of the order of the images.

    Returns:
        The proxy's tensors, by timm's names.

    Raises:
        ModelPlanError: the plan does not fit the backbone.
        WeightsMismatchError: a tensor is missing or has another shape.

    Source: FedPFT (arXiv 2404.11536, section 3.3).
    """
    proxy = proxy_weights(settings, weights)
    if distillation.epochs == 0:
        return proxy
    full = backbone_plan(settings).replace(tune="tail", prompt_count=0)
    depth = anatomy(settings).depth
    whole_proxy = settings.replace(cut=depth, tail_blocks=0, tune="tail", prompt_count=0)
    student = build_head(whole_proxy, proxy)
    trained = _select_trained(settings, student)
    kept = kept_blocks(settings)
    lasts = [*(following - 1 for following in kept[1:]), kept[-1]]
    pairs = [(str(last), str(place)) for place, last in enumerate(lasts)]
    distil(build_head(full, weights), student, pairs, trained, images, distillation, seed)
    return _update_proxy(proxy, student)


def redistil_proxy(
    settings: ModelPlan,
    weights: Mapping[str, Tensor],
    proxy: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    inactive: Tensor,
    images: Tensor,
    distillation: DistillationSettings,
    seed: int,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Distil the least used neurons of a pruned proxy again; the others stay bit for bit.

    Args:
        settings: the model's plan; the whole proxy is its head.
        weights: the backbone's, by timm's names.
        proxy: the proxy's tensors so far, by timm's names.
        state: the tuned state, which teacher and student both use.
        inactive: each neuron's share of inactive tokens on the devices, [L, H].
        images: [N, 3, S, S], preprocessed for the backbone.
        distillation: epochs, batch size, learning rate and the share of retained neurons.
        seed: of the order of the images.
        before_batch: called before each batch; an exception from it ends the work.

    Returns:
        The proxy's tensors, by timm's names.

    Raises:
        ModelPlanError: the plan does not fit the backbone.
        WeightsMismatchError: a tensor is missing or has another shape.

    Source: FedPFT (arXiv 2404.11536, section 3.3).
    """
    full, full_state = insert_into_backbone(settings, state)
    teacher = build_head(full, Layered(head_tensors(full_state), weights))
    student = build_head(settings, Layered(head_tensors(state), proxy))
    student.requires_grad_(False)
    retained = select_retained_neurons(inactive, distillation.retained)
    rows = zip(pruned_mlps(student), retained, strict=True)
    trained = [parameter for mlp, row in rows for parameter in freeze_neurons(mlp, row)]
    pairs = [(number, number) for number in student.blocks]
    prompts = state.get(PROMPTS)
    distil(teacher, student, pairs, trained, images, distillation, seed, prompts, before_batch)
    return _update_proxy(proxy, student)


def _update_proxy(proxy: Mapping[str, Tensor], student: Part) -> dict[str, Tensor]:
    """Return the proxy's tensors, replaced by the student's where the student has them."""
    tensors = student.state_dict()
    return dict(proxy) | {
        name: tensors[key].detach().clone()
        for name, key in student.names().items()
        if name in proxy
    }


def distil(
    teacher: Part,
    student: Part,
    pairs: BlockPairs,
    trained: Sequence[nn.Parameter],
    inputs: Tensor,
    distillation: DistillationSettings,
    seed: int,
    prompts: Tensor | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train some of the student's parameters in place, with Adam; the rest stay as they are.

    Args:
        teacher: reproduced by the student.
        student: a part of the same kind.
        pairs: the blocks to compare.
        trained: the student's parameters to train; none: do nothing.
        inputs: of both parts, [N, ...].
        distillation: epochs, batch size, learning rate and the MLPs' weight in the loss.
        seed: of the order of the inputs.
        prompts: further input [P, D] of both parts, if both are heads.
        before_batch: called before each batch; an exception from it ends the work.

    Returns:
        The mean loss of each epoch.
    """
    if not trained:
        return []
    for parameter in trained:
        parameter.data = parameter.detach().clone()  # the backbone's tensor stays unchanged
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=distillation.learning_rate)
    losses = []
    for epoch in range(distillation.epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, "distillation", epoch))
        order = torch.randperm(len(inputs), generator=generator)
        total = 0.0
        for positions in order.split(distillation.batch_size):
            before_batch()
            batch = inputs[positions]
            with torch.no_grad():
                target = trace_layers(teacher, batch, prompts)
            output = trace_layers(student, batch, prompts)
            loss = layer_loss(target, output, pairs, distillation.mlp_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(positions)
        losses.append(total / len(inputs))
        log.info(
            "distillation, epoch %d of %d: loss %.5f", epoch + 1, distillation.epochs, losses[-1]
        )
    for parameter in trained:
        parameter.requires_grad_(False)
    return losses


def _select_trained(settings: ModelPlan, student: Head) -> list[nn.Parameter]:
    """Return the parameters of narrower MLPs, or else of the blocks that LoRA does not change."""
    if settings.mlp_widths:
        modules = [f"{number}.mlp" for number in narrowed_blocks(settings)]
    else:
        changed = lora_blocks(settings) if settings.tune == "lora" else set()
        modules = [number for number in student.blocks if int(number) not in changed]
    blocks = student.blocks
    return [parameter for name in modules for parameter in blocks.get_submodule(name).parameters()]
