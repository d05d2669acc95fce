"""The device's side of FedPFT: reports which neurons its samples use, before a redistillation."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_client.method import DeviceMethod
from edge_client.training.context import RoundContext
from protocol.messages import NEURONS
from tuning_methods.proxies.neurons import InactiveNeurons

_BATCH = 128


class FedPFTDevice(DeviceMethod):
    """Trains the proxy as a whole model; some updates carry the neurons' inactivity."""

    def update_extras(self, context: RoundContext, selected: Tensor) -> dict[str, Tensor]:
        if not context.run.distillation.due(context.round, context.run.federation.rounds):
            return {}
        return {NEURONS: inactive_neurons(context, selected)}


@torch.no_grad()
def inactive_neurons(context: RoundContext, selected: Tensor) -> Tensor:
    """Return each neuron's share of tokens with an output not above zero, [L, H], float32.

    Counted over the selected samples [k], through the current head, prompts included.

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
