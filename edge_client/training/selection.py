"""Phase 1a: score every sample with head and tail alone, and select the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_client.training.context import RoundContext
from pruning import SCORES, draw_random_scores, select_highest

_BATCH = 128


@torch.no_grad()
def select_samples(context: RoundContext) -> Tensor:
    """Return the positions [k] of the samples for split training, ascending.

    Scores are computed with head → tail, without body and prompts. With ``keep_fraction`` 1, all
    samples are selected without scores.

    Source: SFPrompt (arXiv 2407.17533, section 3).
    """
    training = context.run.training
    positions = torch.arange(len(context.samples))
    if training.keep_fraction == 1 or len(positions) == 0:
        return positions
    labels = context.samples.images.image_set.labels
    generator = torch.Generator().manual_seed(context.seed("prune"))
    if training.pruning == "random":  # needs no output of the model
        scores: Tensor = draw_random_scores(len(positions), generator)
    else:
        logits, inputs = _score_inputs(context, positions)
        scores = SCORES[training.pruning](logits, labels, inputs, generator)
    return select_highest(scores, training.keep_fraction, labels, training.prune_per_class)


def _score_inputs(context: RoundContext, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the logits [n, C] and the classifier's inputs [n, D] of these samples [n]."""
    tail = context.model.tail
    logits, inputs = [], []
    batches = positions.split(_BATCH)
    for done, batch in enumerate(batches, start=1):
        smashed = _smashed_without_prompts(context, batch)  # [b, T', D]
        inputs.append(tail.pool(smashed))
        logits.append(tail(smashed))
        context.advance("prune", done, len(batches))
    return torch.cat(logits), torch.cat(inputs)


def _smashed_without_prompts(context: RoundContext, positions: Tensor) -> Tensor:
    samples = context.samples
    if samples.outputs is not None:
        return samples.outputs.for_tail(positions)
    smashed: Tensor = context.model.head(samples.images.read(positions)[0])
    return smashed
