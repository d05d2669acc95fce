"""The device's side of FedPFT: reports which neurons its samples use, before a redistillation."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_client.data.image_set import Labels
from edge_client.method import DeviceMethod
from edge_client.torch_model import model_of, read
from edge_client.training.context import RoundContext
from tuning_methods.proxies.neurons import NEURONS, InactiveNeurons
from tuning_methods.proxies.settings import distillation_of

_BATCH = 128


class FedPFTDevice(DeviceMethod):
    """Trains the proxy as a whole model; some updates carry the neurons' inactivity.

    Source: FedPFT (arXiv 2404.11536, section 3.3).
    """

    def update_extras(self, context: RoundContext, selected: Labels) -> dict[str, Tensor]:
        distillation = distillation_of(context.run)
        if not distillation.is_due(context.round, context.run.federation.rounds):
            return {}
        return {NEURONS: measure_inactivity(context, selected)}


@torch.no_grad()
def measure_inactivity(context: RoundContext, selected: Labels) -> Tensor:
    """Measure each neuron's share of tokens with an activation not above zero.

    Args:
        context: the round; the current head and prompts are used.
        selected: positions of the samples, [k].

    Returns:
        Shares [L, H] in float32, of L narrower MLPs with H neurons each.

    Source: FedPFT (arXiv 2404.11536, section 3.3).
    """
    model = model_of(context)
    neurons = InactiveNeurons(model.head)
    batches = [selected[start : start + _BATCH] for start in range(0, len(selected), _BATCH)]
    with neurons.counting():
        for done, positions in enumerate(batches, start=1):
            images, _ = read(context.samples.images, positions)
            model.head(images, model.prompts)
            context.advance("neurons", done, len(batches))
    return neurons.shares
