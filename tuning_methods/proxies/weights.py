"""A proxy's weights, taken from its backbone, and what was tuned on it put into the backbone.

FedPFT (arXiv 2404.11536, section 3.2) prunes neurons of the MLPs; offsite-tuning (arXiv 2302.04870,
section 3) drops blocks. Either way the proxy is a model like any other, with timm's names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, kept_blocks, proxy_width, pruned_blocks
from split_model.checkpoints.state import HEAD, TunedState, check_state, state_shapes
from split_model.errors import ModelPlanError
from split_model.parts.head import is_added

_BLOCKS = "blocks."


def whole_model(settings: ModelPlan) -> ModelPlan:
    """The backbone behind a proxy, uncut: all of its blocks in the head. Others as they are."""
    if settings.proxy == "none":
        return settings
    bare = settings.replace(proxy="none", cut=0, tail_blocks=0, tune="tail")
    depth = anatomy(bare).depth
    return bare.replace(cut=depth, tune=settings.tune)


def neuron_order(ways_in: Tensor, ways_out: Tensor) -> Tensor:
    """The neurons of an MLP, [H], the weightiest first.

    Args:
        ways_in: weights of the first layer, [H, D].
        ways_out: those of the second, [D', H].

    A neuron weighs the L2 norm of its row of the first and its column of the second (FedPFT,
    arXiv 2404.11536, section 3.2); of equal ones the first is first.
    """
    squares = ways_in.double().square().sum(dim=1) + ways_out.double().square().sum(dim=0)
    return squares.argsort(descending=True, stable=True)


def proxy_weights(settings: ModelPlan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the proxy, from those of its backbone; both by timm's names.

    Those that are the backbone's own are not copied. Raises `ModelPlanError`.
    """
    depth = _depth(settings)
    places = {number: place for place, number in enumerate(kept_blocks(settings, depth))}
    made: dict[str, Tensor] = {}
    for name in weights:
        place = _renumbered(name, places)
        if place is not None:
            made[place] = weights[name]
    for number in pruned_blocks(settings, depth):
        mlp = f"{_BLOCKS}{number}.mlp."
        ways_in, ways_out = weights[mlp + "fc1.weight"], weights[mlp + "fc2.weight"]
        width = proxy_width(settings, len(ways_in))
        kept = neuron_order(ways_in, ways_out)[:width].sort().values
        made[mlp + "fc1.weight"] = ways_in[kept].contiguous()
        made[mlp + "fc2.weight"] = ways_out[:, kept].contiguous()
        if mlp + "fc1.bias" in weights:
            made[mlp + "fc1.bias"] = weights[mlp + "fc1.bias"][kept].contiguous()
    return made


def plugged(settings: ModelPlan, state: Mapping[str, Tensor]) -> tuple[ModelPlan, TunedState]:
    """What was tuned on a proxy, as a state of the whole backbone, uncut.

    Blocks that the proxy does not have are not changed.

    Raises `ModelPlanError` where the run was not of the whole proxy on the device, or
    `WeightsMismatchError`.
    """
    check_state(settings, state)
    if settings.proxy == "none":
        return settings, dict(state)
    if settings.cut != anatomy(settings).depth:
        limit = f"{anatomy(settings).depth}, the whole proxy, to be put into the backbone"
        raise ModelPlanError("cut", limit, settings.cut)
    numbers = dict(enumerate(kept_blocks(settings, _depth(settings))))
    # With LoRA at the ends, the backbone's ends are other blocks than those in all: ask for all.
    target = whole_model(settings).replace(lora_ends=0)
    made: TunedState = {}
    for name, tensor in state.items():
        own = name.removeprefix(HEAD)
        moved = _renumbered(own, numbers) if name.startswith(HEAD) else own
        made[HEAD + str(moved) if name.startswith(HEAD) else name] = tensor
    for name, shape in state_shapes(target).items():
        if name not in made and is_added(name.removeprefix(HEAD)):
            made[name] = torch.zeros(shape)
    check_state(target, made)
    return target, made


def _depth(settings: ModelPlan) -> int:
    return whole_model(settings).cut if settings.proxy != "none" else anatomy(settings).depth


def _renumbered(name: str, places: Mapping[int, int]) -> str | None:
    """A tensor's name with its block's number exchanged; None where that block has no place."""
    if not name.startswith(_BLOCKS):
        return name
    number, rest = name.removeprefix(_BLOCKS).split(".", 1)
    place = places.get(int(number))
    return None if place is None else f"{_BLOCKS}{place}.{rest}"
