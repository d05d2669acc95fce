"""Phase 2: train prompts and tail through the server's body. Labels stay here."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.model import DeviceModel
from edge_client.training.context import Diverged, RoundContext
from edge_client.transport import SamplesMissing, SplitPlane
from edge_client.transport.deltas import Sample
from protocol.codecs.registry import as_decoded
from protocol.errors import StepLost
from protocol.messages import MAX_LOSS, BodyStepMeta, ExchangeMeta
from split_model import make_optimizer, set_progress

_SENDINGS = 5  # of one step's forward, before its loss is reported as an error


@dataclass(frozen=True)
class TrainingResult:
    """What split training came to: the mean cross-entropy over its last epoch.

    ``session`` names what belongs to it of prompts or body, where those are tuned on the server.
    """

    loss: float
    session: str | None = None


def split_train(context: RoundContext, plane: SplitPlane, kept: Tensor) -> TrainingResult:
    """Split training in U-shape over the kept samples [k] (SFPrompt, section 3).

    With prompts at the input, four tensors a step: smashed data up, features down, their gradient
    up, the gradient of the smashed data down. With prompts at the cut, two: features down and
    their gradient up, in one round trip. Where the body is tuned, too, it is four as well, numbered
    within a session.

    Raises:
        StaleRound: the round was closed without this participant.
        StepLost: the server has lost what it held of this round; begin it anew.
    """
    if context.run.model.prompt_at == "cut":
        return _train_with_prompts_at_the_cut(context, plane, kept)
    if context.run.model.tune_body:
        return _train_with_the_body(context, plane, kept)
    return _train_with_prompts_at_the_input(context, plane, kept)


def _train_with_prompts_at_the_input(
    context: RoundContext, plane: SplitPlane, kept: Tensor
) -> TrainingResult:
    model = context.model
    optimizer = make_optimizer(context.run.training, model.prompts, model.tail, head=model.head)
    batches = _Batches(context, kept)
    name = f"{secrets.token_hex(4)}.{context.round}.{context.attempt}"
    for step, (epoch, positions) in enumerate(batches):
        set_progress(optimizer, context.rate_factor(step, batches.steps))
        epoch_of_round = context.run.training.local_epochs + epoch
        view = context.view(epoch_of_round)  # without copies every epoch has a view of its own
        seen = context.epoch_of_run(epoch_of_round) if plane.copies is None else view
        images, labels = context.samples.images.read(positions, epoch=seen)
        samples = [(position, view) for position in positions.tolist()]
        optimizer.zero_grad()
        noise = context.noise(step)
        loss = _step(context, plane, samples, images, labels, f"{name}.{step}", noise)
        context.pull()
        optimizer.step()
        batches.count(epoch, loss, len(positions))
    return TrainingResult(batches.mean_loss)


def _step(
    context: RoundContext,
    plane: SplitPlane,
    samples: Sequence[Sample],
    images: Tensor,
    labels: Tensor,
    name: str,
    noise: torch.Generator | None,
) -> float:
    """Leave the gradients of one batch in prompts and tail, and return its mean loss."""
    model = context.model
    smashed = model.head(images, model.prompts)
    for sending in range(_SENDINGS):
        # A step is named once a sending: the server answers a repeated name with its old answer.
        step = f"{name}.{sending}"
        try:
            features, decoded = _forward(context, plane, samples, smashed.detach(), step)
            loss, gradients = _through_the_tail(model, features, labels)
            if not smashed.requires_grad:
                return loss  # nothing is tuned ahead of the cut: nobody needs their gradient
            returned = plane.backward(
                gradients,
                step=step,
                round_=context.round,
                smashed=tuple(smashed.shape),
                noise=noise,
            )
            break
        except (SamplesMissing, StepLost):
            if sending == _SENDINGS - 1:
                raise
    # Straight through: what the codecs have changed is taken for what was sent.
    smashed.backward(_corrected(context, returned, smashed.detach(), decoded))
    return loss


def _train_with_the_body(context: RoundContext, plane: SplitPlane, kept: Tensor) -> TrainingResult:
    """Head, body and tail (SplitFed, arXiv 2004.12088): no step can be sent under another name."""
    model = context.model
    optimizer = make_optimizer(context.run.training, None, model.tail, head=model.head)
    batches = _Batches(context, kept)
    session = f"{secrets.token_hex(4)}.{context.round}.{context.attempt}"
    for step, (epoch, positions) in enumerate(batches):
        set_progress(optimizer, context.rate_factor(step, batches.steps))
        meta = BodyStepMeta(
            session=session,
            round=context.round,
            attempt=context.attempt,
            number=step,
            steps=batches.steps,
        )
        seen = context.epoch_of_run(context.run.training.local_epochs + epoch)
        images, labels = context.samples.images.read(positions, epoch=seen)
        optimizer.zero_grad()
        smashed = model.head(images)
        features = plane.body_forward(smashed.detach(), meta)
        loss, gradients = _through_the_tail(model, features, labels)
        shape, noise = tuple(smashed.shape), context.noise(step)
        returned = plane.body_backward(gradients, meta, shape, noise)
        smashed.backward(_corrected(context, returned, smashed.detach(), None))
        optimizer.step()
        batches.count(epoch, loss, len(positions))
    return TrainingResult(batches.mean_loss, session)


def _forward(
    context: RoundContext,
    plane: SplitPlane,
    samples: Sequence[Sample],
    smashed: Tensor,
    step: str,
) -> tuple[Tensor, Tensor | None]:
    """Features [B, T', D], and the smashed data [B, T, D] as the server has them, if known."""
    copies = plane.copies
    if copies is None:
        return plane.forward(smashed, step=step, round_=context.round), None
    revision = copies.revise(samples, smashed)
    try:
        features = plane.forward(revision, step=step, round_=context.round)
    except SamplesMissing as error:
        copies.forget(samples[place] for place in error.places)
        raise
    copies.confirm(revision)
    return features, revision.decoded


def _corrected(
    context: RoundContext, gradient: Tensor, smashed: Tensor, decoded: Tensor | None
) -> Tensor:
    """The gradient at the smashed data [B, T, D] from that at what the server decoded.

    It grows by `gradient_correction` times what the codecs left out, as if the loss were curved
    alike everywhere (FedLite, arXiv 2201.11865).
    """
    wire = context.run.wire
    if not wire.gradient_correction:
        return gradient
    if decoded is None:
        decoded = as_decoded(smashed, wire.smashed)
    return gradient + wire.gradient_correction * (smashed - decoded)


def _train_with_prompts_at_the_cut(
    context: RoundContext, plane: SplitPlane, kept: Tensor
) -> TrainingResult:
    """One exchange a step: the gradients of a batch go up with the ids of the next one."""
    samples, model = context.samples, context.model
    if samples.kept is not None:
        for view in _views(context):
            samples.kept.ensure(kept, view)
    optimizer = make_optimizer(context.run.training, None, model.tail)
    batches = _Batches(context, kept)
    session = f"{secrets.token_hex(4)}.{context.round}.{context.attempt}"

    def meta(number: int) -> ExchangeMeta:
        return ExchangeMeta(
            session=session,
            round=context.round,
            attempt=context.attempt,
            number=number,
            steps=batches.steps,
        )

    gradients: Tensor | None = None
    for step, (epoch, positions) in enumerate(batches):
        sent = gradients

        def request(batch: Tensor, step: int = step, sent: Tensor | None = sent) -> Tensor | None:
            return plane.exchange(meta(step), sent, batch, context.noise(step))

        view = context.view(context.run.training.local_epochs + epoch)
        features = samples.with_batch(positions, view, request)
        if features is None:
            raise StepLost("the server answered a batch without its features", field="session")
        set_progress(optimizer, context.rate_factor(step, batches.steps))
        labels = samples.images.image_set.labels[positions]
        loss, gradients = _through_the_tail(model, features, labels)
        optimizer.step()
        batches.count(epoch, loss, len(positions))
    plane.exchange(meta(batches.steps), gradients, None, context.noise(batches.steps))
    return TrainingResult(batches.mean_loss, session)


def _views(context: RoundContext) -> list[int | None]:
    """The views that split training sees in this round, each once."""
    training = context.run.training
    epochs = range(training.local_epochs, training.local_epochs + training.split_epochs)
    return list(dict.fromkeys(context.view(epoch) for epoch in epochs))


def _through_the_tail(model: DeviceModel, features: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The mean loss and the gradient of the features; the tail's stay in its parameters."""
    features = features.requires_grad_()
    loss = F.cross_entropy(model.tail(features), labels)
    parameters = [tensor for tensor in model.tail.parameters() if tensor.requires_grad]
    returned, *gradients = torch.autograd.grad(loss, [features, *parameters])
    if not bool(torch.isfinite(returned).all()) or not 0 <= loss.item() <= MAX_LOSS:
        raise Diverged(f"the training has diverged: the loss of a batch is {loss.item():g}")
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return loss.item(), returned


class _Batches:
    """The batches of a round's split training, and the mean loss of its last epoch."""

    def __init__(self, context: RoundContext, kept: Tensor) -> None:
        training = context.run.training
        self._batches = context.batches("split", kept, training.split_epochs)
        self._last = training.split_epochs - 1
        self._kept = len(kept)
        self._loss = 0.0
        self.steps = training.split_epochs * math.ceil(len(kept) / training.batch_size)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self._batches

    def count(self, epoch: int, loss: float, samples: int) -> None:
        if epoch == self._last:
            self._loss += loss * samples

    @property
    def mean_loss(self) -> float:
        return self._loss / self._kept
