"""Make a proxy's weights from its backbone's, and insert a state tuned on it into the backbone.

FedPFT (arXiv 2404.11536, section 3.2) prunes neurons of the MLPs; offsite-tuning (arXiv 2302.04870,
section 3) drops blocks. In both cases the proxy is a model like any other, with timm's names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy, kept_blocks
from split_model.checkpoints.state import HEAD, TunedState, check_state, state_shapes
from split_model.errors import ModelPlanError
from split_model.parts.head import is_added

_BLOCKS = "blocks."


def backbone_plan(settings: ModelPlan) -> ModelPlan:
    """Return the plan of the proxy's backbone with all blocks in the head.

    A plan without a proxy is returned unchanged.
    """
    if not settings.is_reshaped:
        return settings
    bare = settings.replace(blocks=(), mlp_widths=(), cut=0, tail_blocks=0, tune="tail")
    depth = anatomy(bare).depth
    return bare.replace(cut=depth, tune=settings.tune)


def rank_neurons(weights_in: Tensor, weights_out: Tensor) -> Tensor:
    """Rank an MLP's neurons by the L2 norm of their weights, largest first; ties keep their order.

    Args:
        weights_in: the first layer's, [H, D]; a neuron is a row.
        weights_out: the second layer's, [D', H]; a neuron is a column.

    Returns:
        The neurons' indices, [H].

    Source: FedPFT (arXiv 2404.11536, section 3.2).
    """
    squares = weights_in.double().square().sum(dim=1) + weights_out.double().square().sum(dim=0)
    return squares.argsort(descending=True, stable=True)


def proxy_weights(settings: ModelPlan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select a proxy's tensors from its backbone's; both by timm's names.

    Unchanged tensors are shared with the backbone, not copied.

    Raises:
        ModelPlanError: the plan does not fit the backbone.
    """
    numbers = kept_blocks(settings)
    places = {number: place for place, number in enumerate(numbers)}
    proxy: dict[str, Tensor] = {}
    for name in weights:
        new_name = _renumber_block(name, places)
        if new_name is not None:
            proxy[new_name] = weights[name]
    for place in narrowed_blocks(settings):
        mlp, new_mlp = (f"{_BLOCKS}{number}.mlp." for number in (numbers[place], place))
        weights_in, weights_out = weights[mlp + "fc1.weight"], weights[mlp + "fc2.weight"]
        width = settings.mlp_widths[place]
        kept = rank_neurons(weights_in, weights_out)[:width].sort().values
        proxy[new_mlp + "fc1.weight"] = weights_in[kept].contiguous()
        proxy[new_mlp + "fc2.weight"] = weights_out[:, kept].contiguous()
        if mlp + "fc1.bias" in weights:
            proxy[new_mlp + "fc1.bias"] = weights[mlp + "fc1.bias"][kept].contiguous()
    return proxy


def narrowed_blocks(settings: ModelPlan) -> list[int]:
    """List the proxy's blocks with a narrower MLP, in order."""
    return [number for number, width in enumerate(settings.mlp_widths) if width]


def check_tuned(settings: ModelPlan) -> None:
    """Check that what is tuned on the proxy also exists in its backbone.

    Raises:
        ModelPlanError: biases of fewer neurons are tuned, for example.
    """
    if settings.tune not in ("tail", "classifier", "lora"):
        raise ModelPlanError("tune", "tail, classifier or lora on a proxy", settings.tune)
    if settings.prompt_at != "input":
        raise ModelPlanError("prompt_at", "input on a proxy", settings.prompt_at)
    if settings.prompt_depth != "shallow":
        raise ModelPlanError("prompt_depth", "shallow on a proxy", settings.prompt_depth)


def insert_into_backbone(
    settings: ModelPlan, state: Mapping[str, Tensor]
) -> tuple[ModelPlan, TunedState]:
    """Turn a state tuned on a proxy into a state of the whole backbone.

    Blocks that the proxy does not have stay unchanged.

    Returns:
        The backbone's plan, uncut, and its state. Without a proxy: the given plan and state.

    Raises:
        ModelPlanError: the device did not have the whole proxy, or tuned what only a proxy has.
        WeightsMismatchError: the state does not fit the plan.
    """
    check_state(settings, state)
    if not settings.is_reshaped:
        return settings, dict(state)
    check_tuned(settings)
    if settings.cut != anatomy(settings).depth:
        limit = f"{anatomy(settings).depth}, the whole proxy, to be put into the backbone"
        raise ModelPlanError("cut", limit, settings.cut)
    numbers = dict(enumerate(kept_blocks(settings)))
    # With `lora_ends` the target would tune other blocks than the proxy did: it tunes all.
    target = backbone_plan(settings).replace(lora_ends=0)
    moved: TunedState = {}
    for name, tensor in state.items():
        if name.startswith(HEAD):
            new_name = _renumber_block(name.removeprefix(HEAD), numbers)
            moved[f"{HEAD}{new_name}"] = tensor
        else:
            moved[name] = tensor
    for name, shape in state_shapes(target).items():
        if name not in moved and is_added(name.removeprefix(HEAD)):
            moved[name] = torch.zeros(shape)
    check_state(target, moved)
    return target, moved


def _renumber_block(name: str, places: Mapping[int, int]) -> str | None:
    """Replace the block's number in a tensor's name; None: the block has no new number."""
    if not name.startswith(_BLOCKS):
        return name
    number, rest = name.removeprefix(_BLOCKS).split(".", 1)
    place = places.get(int(number))
    return None if place is None else f"{_BLOCKS}{place}.{rest}"
