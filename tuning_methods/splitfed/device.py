"""The device's side of SplitFed; with tune = full, the server tunes a body for each device."""

from __future__ import annotations

import torch

from edge_client.data.image_set import Labels
from edge_client.method import DeviceMethod
from edge_client.torch_model import model_of, read
from edge_client.training.context import RoundContext
from edge_client.training.split_training import (
    SplitBatches,
    TrainingResult,
    correct_gradient,
    new_name,
    train_tail,
)
from edge_client.transport.split_client import SplitPlane
from protocol.messages import BodyStepMeta
from split_model.optimizer import make_optimizer, set_progress


class SplitFedDevice(DeviceMethod):
    """Trains through the frozen body, or through the copy that the server tunes for this device.

    Source: SplitFed (arXiv 2004.12088).
    """

    def split_train(
        self, context: RoundContext, plane: SplitPlane, selected: Labels
    ) -> TrainingResult:
        if context.run.model.tune_body:
            return train_with_tuned_body(context, plane, selected)
        return super().split_train(context, plane, selected)


def train_with_tuned_body(
    context: RoundContext, plane: SplitPlane, selected: Labels
) -> TrainingResult:
    """Train head, body and tail on the selected samples.

    A step sends four tensors, numbered within a session. A lost step cannot be repeated in another
    session, because it has already changed the body.

    Args:
        context: the round.
        plane: requests to the server.
        selected: positions of the samples, [k].

    Returns:
        The last epoch's loss, and the session whose body the update uses.

    Raises:
        Diverged: a loss or a gradient is not finite.
        StaleRound: the server closed the round without this participant.
        StepLost: the server lost the session; start the round again.

    Source: SplitFed (arXiv 2004.12088).
    """
    model = model_of(context)
    optimizer = make_optimizer(context.run.training, None, model.tail, head=model.head)
    batches = SplitBatches(context, selected)
    session = new_name(context)
    for step, (epoch, positions) in enumerate(batches):
        set_progress(optimizer, context.rate_factor(step, batches.steps))
        meta = BodyStepMeta(
            session=session,
            round=context.round,
            attempt=context.attempt,
            number=step,
            steps=batches.steps,
        )
        epoch_of_run = context.epoch_of_run(context.run.training.local_epochs + epoch)
        images, labels = read(context.samples.images, positions, epoch_of_run)
        optimizer.zero_grad()
        smashed = model.head(images)
        features = torch.from_numpy(plane.body_forward(smashed.detach(), meta))
        loss, gradients = train_tail(model, features, labels)
        shape, noise = tuple(smashed.shape), context.noise(step)
        gradient = torch.from_numpy(plane.body_backward(gradients, meta, shape, noise))
        smashed.backward(correct_gradient(context, gradient, smashed.detach(), None))
        optimizer.step()
        batches.add_loss(epoch, loss, len(positions))
    return TrainingResult(batches.mean_loss, session)
