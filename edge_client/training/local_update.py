"""Phase 1b: tune on the device alone, with the body left out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.training.context import Diverged, RoundContext
from protocol.messages import MAX_LOSS
from split_model.optimizer import make_optimizer, set_progress


def local_update(context: RoundContext) -> float | None:
    """The local-loss update of SFPrompt (arXiv 2407.17533, section 3), on all samples.

    The head's output goes straight into the tail, or through the run's small body on the device;
    nothing crosses the network. Prompts that join
    at the cut are not here and have no part in it. Where the device holds the whole model, this is
    the local training of FedAvg and FedPEFT (arXiv 2210.01708).

    Returns:
        The mean cross-entropy over the last epoch; None where there was nothing to do.
    """
    training, model = context.run.training, context.model
    samples = len(context.samples)
    if training.local_epochs == 0 or samples == 0:
        return None
    scale = training.local_learning_rate_scale
    optimizer = make_optimizer(training, model.prompts, model.tail, scale, model.head)
    # One rate for the phase, the one of the round's middle: a warm-up begins at 0.
    set_progress(optimizer, context.rate_factor(1, 2))
    loss_sum = 0.0
    everything = torch.arange(samples)
    for epoch, positions in context.batches("local", everything, training.local_epochs):
        smashed, labels = _smashed(context, positions, epoch)
        loss = F.cross_entropy(model.tail(smashed), labels)
        optimizer.zero_grad()
        if not 0 <= loss.item() <= MAX_LOSS:
            raise Diverged(f"the local update has diverged: the loss of a batch is {loss.item():g}")
        loss.backward()
        context.pull()
        optimizer.step()
        if epoch == training.local_epochs - 1:
            loss_sum += loss.item() * len(positions)
    if not all(bool(torch.isfinite(own).all()) for own in model.parameters()):
        raise Diverged("the local update has diverged: what it has tuned is not finite")
    return loss_sum / samples


def _smashed(context: RoundContext, positions: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
    """What the tail is to read of a batch, [b, T', D], and its labels [b]."""
    samples, model = context.samples, context.model
    labels = samples.images.image_set.labels[positions]
    if samples.outputs is not None:
        return samples.outputs.for_tail(positions, context.view(epoch)), labels
    images, _ = samples.images.read(positions, epoch=context.epoch_of_run(epoch))
    smashed = model.head(images, model.prompts)
    return smashed if model.local_body is None else model.local_body(smashed), labels
