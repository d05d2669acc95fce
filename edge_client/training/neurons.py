"""Count inactive neurons of the head, for runs whose pruned proxy is distilled again."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_client.training.context import RoundContext
from split_model.proxies.neurons import InactiveNeurons

_BATCH = 128


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
