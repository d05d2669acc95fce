"""How busy the neurons of a proxy's MLPs are, and which of them are distilled again.

FedPFT (arXiv 2404.11536, section 3.3): during federated learning the devices tell how often each
neuron of a narrower MLP was inactive. The busiest stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.backbone.architecture import pruned_blocks
from split_model.errors import ModelPlanError
from split_model.parts.head import Head
from tuning_methods.proxies.weights import whole_model


def pruned_mlps(head: Head) -> list[nn.Module]:
    """The narrower MLPs of a pruned proxy, in the order of its blocks.

    Raises `ModelPlanError` where not all blocks of the proxy are in the head.
    """
    settings = head.settings
    depth = whole_model(settings).cut
    if settings.proxy != "pruned":
        raise ModelPlanError("proxy", "'pruned', to count neurons", settings.proxy)
    if settings.cut != depth:
        limit = f"{depth}, the whole proxy, to count its neurons on the device"
        raise ModelPlanError("cut", limit, settings.cut)
    numbers = pruned_blocks(settings, depth)
    if not numbers:
        limit = f"below half of the {depth} blocks, so that some MLPs are narrower"
        raise ModelPlanError("proxy_ends", limit, settings.proxy_ends)
    return [head.blocks[str(number)].get_submodule("mlp") for number in numbers]


@functools.lru_cache(maxsize=64)
def neurons_shape(settings: ModelPlan) -> tuple[int, int]:
    """How many MLPs are narrower, and of how many neurons each is. Raises as `pruned_mlps`."""
    mlps = pruned_mlps(Head(settings))
    first = mlps[0].get_submodule("fc1")
    return len(mlps), first.get_parameter("weight").shape[0]


class InactiveNeurons:
    """Counts, while images run through a head, the tokens for which a neuron was not above zero.

    Attributes:
        counts: [L, H], whole numbers, of the L narrower MLPs with H neurons each.
        tokens: how many tokens have been seen.
    """

    def __init__(self, head: Head) -> None:
        self._mlps = pruned_mlps(head)
        self.counts = torch.zeros(neurons_shape(head.settings), dtype=torch.int64)
        self.tokens = 0

    @property
    def shares(self) -> Tensor:
        """The counts as shares of the tokens, [L, H] in float32."""
        return (self.counts.double() / max(1, self.tokens)).float()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs through the head in the meantime."""
        hooks = [
            mlp.get_submodule("act").register_forward_hook(self._counter(place))
            for place, mlp in enumerate(self._mlps)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, place: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, made: Tensor) -> None:  # made: [B, T, H]
            active = (made.detach() > 0).sum(dim=(0, 1))
            tokens = made.shape[0] * made.shape[1]
            self.counts[place] += tokens - active
            if place == 0:
                self.tokens += tokens

        return hook


def stay(inactive: Tensor, retained: float) -> Tensor:
    """Which neurons are not distilled again, [L, H] of booleans: in each row the busiest.

    Args:
        inactive: how often each was inactive, [L, H].
        retained: the share of a row that stays, rounded to whole neurons; one at least does not.

    Of neurons that are as busy the first stays.
    """
    width = inactive.shape[1]
    count = min(round(retained * width), width - 1)
    busiest = inactive.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(inactive, dtype=torch.bool).scatter(1, busiest, value=True)


def hold(mlp: nn.Module, staying: Tensor) -> list[nn.Parameter]:
    """Let training pass by the neurons [H] that stay; returns what of the MLP may be trained.

    A neuron is a row of the first layer, its bias and a column of the second. Their gradient is 0,
    and Adam, whose moments begin with 0, does not move them.
    """
    masks = {
        "fc1.weight": staying[:, None],
        "fc1.bias": staying,
        "fc2.weight": staying[None, :],
    }
    trained = []
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(True)
        if name in masks:
            parameter.register_hook(functools.partial(_without, masks[name]))
        trained.append(parameter)
    return trained


def _without(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(mask, 0.0)
