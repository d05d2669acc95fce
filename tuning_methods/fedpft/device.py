"""The device's side of FedPFT: reports which neurons its samples use, before a redistillation."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_client.method import DeviceMethod
from edge_client.training.context import RoundContext
from tuning_methods.proxies.neurons import NEURONS, InactiveNeurons
from tuning_methods.proxies.settings import distillation_of

_BATCH = 128


class FedPFTDevice(DeviceMethod):
    """Trains the proxy as a whole model; some updates carry the neurons' inactivity.

    Source: FedPFT (arXiv 2404.11536, section 3.3).
    """

    def update_extras(self, context: RoundContext, selected: Tensor) -> dict[str, Tensor]:
        distillation = distillation_of(context.run)
        if not distillation.is_due(context.round, context.run.federation.rounds):
            return {}
        return {NEURONS: measure_inactivity(context, selected)}


@torch.no_grad()
def measure_inactivity(context: RoundContext, selected: Tensor) -> Tensor:
    """Measure each neuron's share of tokens with an activation not above zero.

    Args:
        context: the round; the current head and prompts are used.
        selected: positions of the samples, [k].

    Returns:
        Shares [L, H] in float32, of L narrower MLPs with H neurons each.

    Source: FedPFT (arXiv 2404.11536, section 3.3).
    """
    model = context.model
    neurons = InactiveNeurons(model.head)
    batches = selected.split(_BATCH) if len(selected) else ()
    with neurons.counting():
        for done, positions in enumerate(batches, start=1):
            images, _ = context.samples.images.read(positions)
            model.head(images, model.prompts)
            context.advance("neurons", done, len(batches))
    return neurons.shares
