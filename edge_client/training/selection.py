"""Phase 1a: score every sample with head and tail alone, and select the highest scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edge_client.data.image_set import Labels
from edge_client.torch_model import model_of, read
from edge_client.training.context import RoundContext
from pruning import SCORES, draw_random_scores, select_highest

_BATCH = 128


@torch.no_grad()
def select_samples(context: RoundContext) -> Labels:
    """Return the positions [k] of the samples for split training, ascending.

    Scores are computed with head → tail, without body and prompts. With ``keep_fraction`` 1, all
    samples are selected without scores.

    Source: SFPrompt (arXiv 2407.17533, section 3).
    """
    training = context.run.training
    positions = np.arange(len(context.samples))
    if training.keep_fraction == 1 or len(positions) == 0:
        return positions
    labels = torch.from_numpy(context.samples.images.image_set.labels)
    generator = torch.Generator().manual_seed(context.seed("prune"))
    if training.pruning == "random":  # needs no output of the model
        scores: Tensor = draw_random_scores(len(positions), generator)
    else:
        logits, inputs = _score_inputs(context, positions)
        scores = SCORES[training.pruning](logits, labels, inputs, generator)
    selected = select_highest(scores, training.keep_fraction, labels, training.prune_per_class)
    result: Labels = selected.numpy()
    return result


@torch.no_grad()
def _score_inputs(context: RoundContext, positions: Labels) -> tuple[Tensor, Tensor]:
    """Compute the logits [n, C] and the classifier's inputs [n, D] of these samples [n]."""
    tail = model_of(context).tail
    logits, inputs = [], []
    batches = [positions[start : start + _BATCH] for start in range(0, len(positions), _BATCH)]
    for done, batch in enumerate(batches, start=1):
        smashed = _smashed_without_prompts(context, batch)  # [b, T', D]
        inputs.append(tail.pool(smashed))
        logits.append(tail(smashed))
        context.advance("prune", done, len(batches))
    return torch.cat(logits), torch.cat(inputs)


def _smashed_without_prompts(context: RoundContext, positions: Labels) -> Tensor:
    samples = context.samples
    if samples.outputs is not None:
        return torch.from_numpy(samples.outputs.for_tail(positions))
    smashed: Tensor = model_of(context).head(read(samples.images, positions)[0])
    return smashed
