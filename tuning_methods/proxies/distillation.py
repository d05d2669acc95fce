"""Distillation, layer by layer: smaller blocks are taught to do what the backbone's do.

FedPFT (arXiv 2404.11536, section 3.3): before federated learning, on images that are not the
devices', the loss is the mean over the layers of

    |h_T - h_S|^2 / RMS(h_T)^2 + alpha |f_T - f_S|^2 / RMS(f_T)^2

with h what comes out of a layer, f what comes out of its MLP, T of the backbone and S of the proxy,
squares as means over all numbers. What the proxy has of the backbone unchanged stays frozen: what
is tuned beside it is put into the backbone later.

During federated learning (same section) the neurons that devices use least are trained once more
with the same loss, what is tuned being in both as it then is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from protocol.distillation import DistillationSettings
from protocol.plan import ModelPlan
from protocol.seeds import derive_seed
from split_model.backbone.architecture import anatomy, kept_blocks, pruned_blocks
from split_model.checkpoints.state import PROMPTS, head_tensors
from split_model.parts.base import Part
from split_model.parts.build import Layered, build_head
from split_model.parts.head import Head
from tuning_methods.proxies.neurons import hold, pruned_mlps, stay
from tuning_methods.proxies.weights import plugged, proxy_weights, whole_model

log = logging.getLogger(__name__)

Pairs = Sequence[tuple[str, str]]  # the teacher's block, and the pupil's that stands for it


@dataclasses.dataclass(frozen=True)
class Trace:
    """What came out of each block, and of its MLP, [B, T, D] each, by the block's number."""

    blocks: dict[str, Tensor]
    mlps: dict[str, Tensor]


def traced(part: Part, inputs: Tensor, prompts: Tensor | None = None) -> Trace:
    """Run a part and keep what its blocks and their MLPs make. `prompts` [P, D] are for a head."""
    trace = Trace({}, {})

    def keep(place: dict[str, Tensor], number: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, made: Tensor) -> None:
            place[number] = made

        return hook

    handles = []
    for number, block in part.blocks.items():
        handles.append(block.register_forward_hook(keep(trace.blocks, number)))
        mlp = block.get_submodule("mlp")
        handles.append(mlp.register_forward_hook(keep(trace.mlps, number)))
    try:
        part(inputs) if prompts is None else part(inputs, prompts)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def layer_loss(teacher: Trace, pupil: Trace, pairs: Pairs, mlp_weight: float) -> Tensor:
    """The loss above, a number; ``mlp_weight`` is its alpha."""
    terms = [
        _relative(teacher.blocks[theirs], pupil.blocks[own])
        + mlp_weight * _relative(teacher.mlps[theirs], pupil.mlps[own])
        for theirs, own in pairs
    ]
    return torch.stack(terms).mean()


def _relative(wanted: Tensor, found: Tensor) -> Tensor:
    scale = wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)
    return (wanted - found).square().mean() / scale


def distilled_proxy(
    settings: ModelPlan,
    weights: Mapping[str, Tensor],
    images: Tensor,
    how: DistillationSettings,
    seed: int,
) -> dict[str, Tensor]:
    """The proxy's tensors by timm's names, distilled where ``how`` asks for it.

    Args:
        settings: with a proxy.
        weights: of its backbone.
        images: [N, 3, S, S], prepared for the backbone.

    Of a pruned proxy the narrower MLPs are trained, of dropped blocks those between the ends; each
    block stands for those of the backbone up to the next one that stays.

    Raises `ModelPlanError` or `WeightsMismatchError`.
    """
    proxy = proxy_weights(settings, weights)
    if how.epochs == 0:
        return proxy
    full = whole_model(settings).replace(tune="tail", prompt_count=0)
    depth = anatomy(settings).depth
    small = settings.replace(cut=depth, tail_blocks=0, tune="tail", prompt_count=0)
    pupil = build_head(small, proxy)
    trained = _trained(settings, pupil, full.cut)
    kept = kept_blocks(settings, full.cut)
    lasts = [*(following - 1 for following in kept[1:]), kept[-1]]
    pairs = [(str(last), str(place)) for place, last in enumerate(lasts)]
    distil(build_head(full, weights), pupil, pairs, trained, images, how, seed)
    return _taken(pupil, proxy)


def redistilled_proxy(
    settings: ModelPlan,
    weights: Mapping[str, Tensor],
    proxy: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    inactive: Tensor,
    images: Tensor,
    how: DistillationSettings,
    seed: int,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """A pruned proxy whose least busy neurons are distilled again; the others are as they were.

    Args:
        settings: of the run; the whole proxy is its head.
        weights: of the backbone, by timm's names.
        proxy: the tensors that it had so far, by timm's names.
        state: what is tuned, as it is now: it is in teacher and pupil alike.
        inactive: how often each neuron was inactive on the devices, [L, H].
        images: [N, 3, S, S], prepared for the backbone.
        before_batch: is called ahead of every batch; what it raises ends the work.

    Raises `ModelPlanError` or `WeightsMismatchError`.
    """
    full, tuned = plugged(settings, state)
    teacher = build_head(full, Layered(head_tensors(tuned), weights))
    pupil = build_head(settings, Layered(head_tensors(state), proxy))
    pupil.requires_grad_(False)
    rows = zip(pruned_mlps(pupil), stay(inactive, how.retained), strict=True)
    trained = [own for mlp, staying in rows for own in hold(mlp, staying)]
    pairs = [(number, number) for number in pupil.blocks]
    prompts = state.get(PROMPTS)
    distil(teacher, pupil, pairs, trained, images, how, seed, prompts, before_batch)
    return _taken(pupil, proxy)


def _taken(pupil: Part, proxy: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The proxy's tensors, those that the pupil has from there."""
    tensors = pupil.state_dict()
    return dict(proxy) | {
        name: tensors[own].detach().clone() for name, own in pupil.names().items() if name in proxy
    }


def distil(
    teacher: Part,
    pupil: Part,
    pairs: Pairs,
    trained: Sequence[nn.Parameter],
    inputs: Tensor,
    how: DistillationSettings,
    seed: int,
    prompts: Tensor | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train some of the pupil's parameters in place; the rest stay as they are.

    Args:
        inputs: what both parts take, [N, ...].
        prompts: beside them, [P, D], where both are heads.
        before_batch: is called ahead of every batch; what it raises ends the work.

    Returns:
        The mean loss of each epoch.
    """
    if not trained:
        return []
    for parameter in trained:
        parameter.data = parameter.detach().clone()  # the backbone keeps its own
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=how.learning_rate)
    losses = []
    for epoch in range(how.epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, "distillation", epoch))
        total = 0.0
        for positions in torch.randperm(len(inputs), generator=generator).split(how.batch_size):
            before_batch()
            batch = inputs[positions]
            with torch.no_grad():
                wanted = traced(teacher, batch, prompts)
            loss = layer_loss(wanted, traced(pupil, batch, prompts), pairs, how.mlp_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(positions)
        losses.append(total / len(inputs))
        log.info("distillation, epoch %d of %d: loss %.5f", epoch + 1, how.epochs, losses[-1])
    for parameter in trained:
        parameter.requires_grad_(False)
    return losses


def _trained(settings: ModelPlan, pupil: Head, whole_depth: int) -> list[nn.Parameter]:
    if settings.proxy == "pruned":
        mlps = [f"{number}.mlp" for number in pruned_blocks(settings, whole_depth)]
        return [own for mlp in mlps for own in pupil.blocks.get_submodule(mlp).parameters()]
    between = range(settings.proxy_ends, len(pupil.blocks) - settings.proxy_ends)
    return [own for number in between for own in pupil.blocks[str(number)].parameters()]
