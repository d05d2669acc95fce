"""Phase 1b: tune on the device alone, without the server's body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.image_set import Labels
from edge_client.torch_model import model_of, read
from edge_client.training.context import Diverged, RoundContext
from protocol.messages import MAX_LOSS
from split_model.optimizer import make_optimizer, set_progress

LocalForward = Callable[[RoundContext, Tensor], Tensor]


def local_update(context: RoundContext, forward: LocalForward) -> float | None:
    """Run the local-loss update on all samples.

    It sends nothing. It does not tune prompts at the cut, which are on the server. If the device
    has the whole model, this is the local training of FedAvg and FedPEFT (arXiv 2210.01708).

    Args:
        context: the round.
        forward: computes logits [b, C] from the round and smashed data [b, T, D].

    Returns:
        The mean cross-entropy over the last epoch, in nats; None without epochs or samples.

    Raises:
        Diverged: the loss or a tuned parameter is not finite.

    Source: SFPrompt (arXiv 2407.17533, section 3).
    """
    training, model = context.run.training, model_of(context)
    samples = len(context.samples)
    if training.local_epochs == 0 or samples == 0:
        return None
    scale = training.local_learning_rate_scale
    optimizer = make_optimizer(training, model.prompts, model.tail, scale, model.head)
    # The phase uses the learning rate of the middle of the round: a warm-up begins at 0.
    set_progress(optimizer, context.rate_factor(1, 2))
    loss_sum = 0.0
    for epoch, positions in context.batches("local", np.arange(samples), training.local_epochs):
        smashed, labels = _smashed(context, positions, epoch)
        loss = F.cross_entropy(forward(context, smashed), labels)
        optimizer.zero_grad()
        if not 0 <= loss.item() <= MAX_LOSS:
            raise Diverged(f"the local update has diverged: the loss of a batch is {loss.item():g}")
        loss.backward()
        context.add_proximal_gradients()
        optimizer.step()
        if epoch == training.local_epochs - 1:
            loss_sum += loss.item() * len(positions)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise Diverged("the local update has diverged: a tuned parameter is not finite")
    return loss_sum / samples


def _smashed(context: RoundContext, positions: Labels, epoch: int) -> tuple[Tensor, Tensor]:
    """Compute the smashed data of a batch, [b, T, D] or only the tail's tokens, and the labels."""
    samples, model = context.samples, model_of(context)
    if samples.outputs is not None:
        labels = torch.from_numpy(samples.images.image_set.labels[positions])  # [b]
        smashed = samples.outputs.for_tail(positions, context.view(epoch))
        return torch.from_numpy(smashed), labels
    images, labels = read(samples.images, positions, context.epoch_of_run(epoch))
    return model.head(images, model.prompts), labels
