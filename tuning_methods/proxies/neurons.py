"""Which neurons of a pruned proxy's MLPs devices use, and which are distilled again.

Devices report each neuron's share of inactive tokens. The busiest neurons stay as they are.

Source: FedPFT (arXiv 2404.11536, section 3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_model.errors import ModelPlanError
from split_model.parts.head import Head
from tuning_methods.proxies.weights import narrowed_blocks

NEURONS = "neurons"  # tensor of an update: each neuron's share of inactive tokens


def pruned_mlps(head: Head) -> list[nn.Module]:
    """List the L narrower MLPs of a proxy, in the order of its blocks.

    Raises:
        ModelPlanError: the proxy has no such MLP or MLPs of several widths, or is not completely
            in the head.
    """
    settings = head.settings
    depth = anatomy(settings).depth
    if len({width for width in settings.mlp_widths if width}) != 1:
        limit = "one width apart from 0, to count neurons"
        raise ModelPlanError("mlp_widths", limit, settings.mlp_widths)
    if settings.cut != depth:
        limit = f"{depth}, the whole proxy, to count its neurons on the device"
        raise ModelPlanError("cut", limit, settings.cut)
    return [head.blocks[str(number)].get_submodule("mlp") for number in narrowed_blocks(settings)]


@functools.lru_cache(maxsize=64)
def neurons_shape(settings: ModelPlan) -> tuple[int, int]:
    """Return [L, H]: the number of narrower MLPs, and the neurons of each.

    Raises:
        ModelPlanError: as `pruned_mlps` does.
    """
    mlps = pruned_mlps(Head(settings))
    first = mlps[0].get_submodule("fc1")
    return len(mlps), first.get_parameter("weight").shape[0]


class InactiveNeurons:
    """Counts each neuron's inactive tokens, whose activation is not above zero, in a head.

    Attributes:
        counts: inactive tokens [L, H], int64, of the L narrower MLPs with H neurons each.
        tokens: number of tokens that have run through the head.
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
        """Count all tokens that run through the head inside the context."""
        hooks = [
            mlp.get_submodule("act").register_forward_hook(self._counter(row))
            for row, mlp in enumerate(self._mlps)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, row: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, activations: Tensor) -> None:  # [B, T, H]
            active = (activations.detach() > 0).sum(dim=(0, 1))
            tokens = activations.shape[0] * activations.shape[1]
            self.counts[row] += tokens - active
            if row == 0:
                self.tokens += tokens

        return hook


def select_retained_neurons(inactive: Tensor, retained: float) -> Tensor:
    """Select the busiest neurons of each MLP, which are not distilled again.

    Args:
        inactive: each neuron's share of inactive tokens, [L, H].
        retained: the share of an MLP's neurons to retain, rounded to whole neurons, at most H - 1.

    Returns:
        A boolean mask [L, H]. Of equally busy neurons the first are retained.
    """
    width = inactive.shape[1]
    count = min(round(retained * width), width - 1)
    busiest = inactive.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(inactive, dtype=torch.bool).scatter(1, busiest, value=True)


def freeze_neurons(mlp: nn.Module, retained: Tensor) -> list[nn.Parameter]:
    """Freeze the retained neurons, a boolean mask [H], and make the rest of an MLP trainable.

    A neuron is a row of the first layer, its bias and a column of the second. A frozen neuron's
    gradient is 0, and Adam, whose moments begin with 0, does not move it.

    Returns:
        The MLP's parameters, for the optimiser.
    """
    masks = {
        "fc1.weight": retained[:, None],
        "fc1.bias": retained,
        "fc2.weight": retained[None, :],
    }
    trained = []
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(True)
        if name in masks:
            parameter.register_hook(functools.partial(_mask_gradient, masks[name]))
        trained.append(parameter)
    return trained


def _mask_gradient(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(mask, 0.0)
