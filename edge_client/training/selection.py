"""Phase 1a: score every sample through head and tail alone, and keep the best."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_client.training.context import RoundContext
from pruning import SCORES, draw_random_scores, select_highest
from split_model.proxies.neurons import InactiveNeurons


@torch.no_grad()
def select_samples(context: RoundContext) -> Tensor:
    """Positions [k] of the samples to keep for split training, ascending.

    The shortcut of SFPrompt (arXiv 2407.17533, section 3): head → tail without body and prompts.
    With ``keep_fraction`` 1 nothing is scored.
    """
    training = context.run.training
    everything = torch.arange(len(context.samples))
    if training.keep_fraction == 1 or len(everything) == 0:
        return everything
    model, labels = context.model, context.samples.images.image_set.labels
    generator = torch.Generator().manual_seed(context.seed("prune"))
    if training.pruning == "random":  # needs to know nothing of the samples
        scores = draw_random_scores(len(everything), generator)
        return select_highest(scores, training.keep_fraction, labels, training.prune_per_class)
    logits, inputs = [], []
    chunks = everything.split(128)
    for done, positions in enumerate(chunks, start=1):
        smashed = _without_prompts(context, positions)  # [b, T', D]
        inputs.append(model.tail.pool(smashed))
        logits.append(model.tail(smashed))
        context.advance("prune", done, len(chunks))
    scores = SCORES[training.pruning](torch.cat(logits), labels, torch.cat(inputs), generator)
    return select_highest(scores, training.keep_fraction, labels, training.prune_per_class)


def _without_prompts(context: RoundContext, positions: Tensor) -> Tensor:
    samples = context.samples
    if samples.outputs is not None:
        return samples.outputs.for_tail(positions)
    smashed: Tensor = context.model.head(samples.images.read(positions)[0])
    return smashed


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
