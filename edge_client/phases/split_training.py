"""Phase 2: train prompts and tail through the server's body. Labels stay here."""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.phases.context import RoundContext
from edge_client.schedule import make_optimizer, set_progress
from edge_client.transport import Server
from protocol.errors import StepLost

# A device that was restarted in the middle of a round begins it anew: its steps are new ones.
_PROCESS = secrets.token_hex(4)
_SENDINGS = 5  # of one step's forward, before its loss is reported as an error


def split_train(context: RoundContext, server: Server, kept: Tensor) -> float:
    """Split training in U-shape over the kept samples [k] (SFPrompt, section 3).

    Four tensors a step: smashed data up, features down, their gradient up, the gradient of the
    smashed data down.

    Returns:
        The mean cross-entropy over the last epoch.

    Raises:
        StaleRound: the round was closed without this participant.
    """
    training, model = context.run.training, context.model
    optimizer = make_optimizer(training, model.prompts, model.tail)
    steps = training.split_epochs * math.ceil(len(kept) / training.batch_size)
    loss_sum = 0.0
    batches = context.batches("split", kept, training.split_epochs)
    for step, (epoch, positions) in enumerate(batches):
        set_progress(optimizer, context.rate_factor(step, steps))
        number = context.epoch_of_run(training.local_epochs + epoch)
        images, labels = context.samples.read(positions, epoch=number)
        optimizer.zero_grad()
        name = f"{_PROCESS}.{context.round}.{context.attempt}.{step}"
        loss = _step(context, server, images, labels, name)
        optimizer.step()
        if epoch == training.split_epochs - 1:
            loss_sum += loss * len(positions)
    return loss_sum / len(kept)


def _step(
    context: RoundContext, server: Server, images: Tensor, labels: Tensor, name: str
) -> float:
    """Leave the gradients of one batch in prompts and tail, and return its mean loss."""
    model, wire = context.model, context.run.wire
    smashed = model.head(images, model.prompts)  # [B, T, D]
    for sending in range(_SENDINGS):
        # A step is named once a sending: the server answers a repeated name with its old answer.
        step = f"{name}.{sending}"
        features = server.forward(
            smashed.detach(), step=step, round_=context.round, codec=wire.smashed
        ).requires_grad_()
        loss = F.cross_entropy(model.tail(features), labels)
        parameters = list(model.tail.parameters())
        features_gradient, *tail_gradients = torch.autograd.grad(loss, [features, *parameters])
        try:
            smashed_gradient = server.backward(
                features_gradient, step=step, round_=context.round, codec=wire.gradients
            )
            break
        except StepLost:
            if sending == _SENDINGS - 1:
                raise
    for parameter, gradient in zip(parameters, tail_gradients, strict=True):
        parameter.grad = gradient
    if smashed.requires_grad:
        smashed.backward(smashed_gradient)
    return loss.item()
