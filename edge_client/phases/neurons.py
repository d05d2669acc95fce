"""How often the neurons of a proxy's MLPs are inactive on a device's own samples."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_client.phases.context import RoundContext
from split_model.neurons import InactiveNeurons

_CHUNK = 128


@torch.no_grad()
def inactive_neurons(context: RoundContext, kept: Tensor) -> Tensor:
    """For each neuron the share of tokens for which it was not above zero, [L, H], float32.

    Over the samples ``kept`` [n], through the head as it is now, prompts included (FedPFT, arXiv
    2404.11536, section 3.3).
    """
    model = context.model
    found = InactiveNeurons(model.head)
    chunks = kept.split(_CHUNK) if len(kept) else ()
    with found.counting():
        for done, positions in enumerate(chunks, start=1):
            images, _ = context.samples.images.read(positions)
            model.head(images, model.prompts)
            context.advance("neurons", done, len(chunks))
    return found.shares
