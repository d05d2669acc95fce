"""Phase 2: train prompts and tail with the server's body. Labels stay on the device."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.image_set import Labels
from edge_client.model import Floats
from edge_client.torch_model import TorchModel, model_of, read
from edge_client.training.context import Diverged, RoundContext
from edge_client.transport.split_client import Ids, SamplesMissing, SplitPlane
from protocol.codecs.registry import as_decoded
from protocol.errors import StepLost
from protocol.messages import MAX_LOSS, ExchangeMeta
from split_model.optimizer import make_optimizer, set_progress

_MAX_ATTEMPTS = 5  # attempts at one step, before the round is started again

Sample = tuple[int, int | None]  # position in the set, and augmented view; None: no augmentation

# Sends the smashed data [B, T, D] of samples as a step with a name; see `DeviceMethod.forward`.
Forward = Callable[
    [RoundContext, SplitPlane, Sequence[Sample], Tensor, str], tuple[Tensor, Tensor | None]
]


@dataclass(frozen=True)
class TrainingResult:
    """The result of split training.

    Attributes:
        loss: mean cross-entropy over the last epoch, in nats.
        session: session in which the server tuned prompts or a body; None: it tuned nothing.
    """

    loss: float
    session: str | None = None


def forward_whole(
    context: RoundContext,
    plane: SplitPlane,
    samples: Sequence[Sample],
    smashed: Tensor,
    step: str,
) -> tuple[Tensor, Tensor | None]:
    """Send the complete smashed data; see `Forward`."""
    return torch.from_numpy(plane.forward(smashed, step=step, round_=context.round)), None


def split_train(
    context: RoundContext,
    plane: SplitPlane,
    selected: Labels,
    forward: Forward = forward_whole,
    *,
    fixed_views: bool = False,
) -> TrainingResult:
    """Train in U-shape over the selected samples [k].

    With prompts at the input, a step transfers four tensors: smashed data up, features down, the
    gradient of the features up, the gradient of the smashed data down. With prompts at the cut, a
    step transfers two tensors in one round trip: features down and their gradient up.

    Args:
        context: the round.
        plane: the split plane of the run.
        selected: positions of the samples, int64 [k].
        forward: sends smashed data; used with prompts at the input.
        fixed_views: whether to augment a sample to one of ``training.views`` fixed views instead of
            a new view in every epoch; used with prompts at the input.

    Raises:
        Diverged: a loss or a gradient is not finite.
        StaleRound: the server closed the round without this participant.
        StepLost: the server lost its state of this round; start the round again.

    Source: SFPrompt (arXiv 2407.17533, section 3).
    """
    if context.run.model.prompt_at == "cut":
        return _train_with_prompts_at_the_cut(context, plane, selected)
    return _train_with_prompts_at_the_input(context, plane, selected, forward, fixed_views)


def _train_with_prompts_at_the_input(
    context: RoundContext,
    plane: SplitPlane,
    selected: Labels,
    forward: Forward,
    fixed_views: bool,
) -> TrainingResult:
    model = model_of(context)
    optimizer = make_optimizer(context.run.training, model.prompts, model.tail, head=model.head)
    batches = SplitBatches(context, selected)
    name = new_name(context)
    for step, (epoch, positions) in enumerate(batches):
        set_progress(optimizer, context.rate_factor(step, batches.steps))
        epoch_of_round = context.run.training.local_epochs + epoch
        view = context.view(epoch_of_round)
        augmented = view if fixed_views else context.epoch_of_run(epoch_of_round)
        images, labels = read(context.samples.images, positions, augmented)
        samples = [(position, view) for position in positions.tolist()]
        optimizer.zero_grad()
        send = partial(forward, context, plane, samples)
        noise = context.noise(step)
        loss = _run_step(context, plane, send, images, labels, f"{name}.{step}", noise)
        context.add_proximal_gradients()
        optimizer.step()
        batches.add_loss(epoch, loss, len(positions))
    return TrainingResult(batches.mean_loss)


def _run_step(
    context: RoundContext,
    plane: SplitPlane,
    send: Callable[[Tensor, str], tuple[Tensor, Tensor | None]],
    images: Tensor,
    labels: Tensor,
    name: str,
    noise: torch.Generator | None,
) -> float:
    """Compute a batch's gradients of prompts and tail, and return its mean loss."""
    model = model_of(context)
    smashed = model.head(images, model.prompts)
    for attempt in range(_MAX_ATTEMPTS):
        # Each attempt has its own name: the server answers a repeated name from its cache.
        step = f"{name}.{attempt}"
        try:
            features, decoded = send(smashed.detach(), step)
            loss, gradients = train_tail(model, features, labels)
            if not smashed.requires_grad:
                return loss  # no parameter before the cut is tuned
            gradient = plane.backward(
                gradients,
                step=step,
                round_=context.round,
                smashed=tuple(smashed.shape),
                noise=noise,
            )
            break
        except (SamplesMissing, StepLost):
            if attempt == _MAX_ATTEMPTS - 1:
                raise
    # Straight-through estimate: the codec's error is treated as a constant.
    at_decoded = torch.from_numpy(gradient)
    smashed.backward(correct_gradient(context, at_decoded, smashed.detach(), decoded))
    return loss


def _train_with_prompts_at_the_cut(
    context: RoundContext, plane: SplitPlane, selected: Labels
) -> TrainingResult:
    """Send one request a step: the gradients of a batch, and the ids of the next batch."""
    samples, model = context.samples, model_of(context)
    if samples.uploader is not None:
        for view in _views(context):
            samples.uploader.ensure(selected, view)
    # A tail that was fitted in closed form is not tuned here: a few steps would worsen it.
    tail = None if context.run.model.depths else model.tail
    optimizer = make_optimizer(context.run.training, None, tail)
    batches = SplitBatches(context, selected)
    session = new_name(context)

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

        def request(
            batch: Floats | Ids, step: int = step, sent: Tensor | None = sent
        ) -> Floats | None:
            return plane.exchange(meta(step), sent, batch, context.noise(step))

        view = context.view(context.run.training.local_epochs + epoch)
        features = samples.request_with_batch(positions, view, request)
        if features is None:
            raise StepLost("the server answered a batch without its features", field="session")
        set_progress(optimizer, context.rate_factor(step, batches.steps))
        labels = torch.from_numpy(samples.images.image_set.labels[positions])
        loss, gradients = train_tail(model, torch.from_numpy(features), labels)
        optimizer.step()
        batches.add_loss(epoch, loss, len(positions))
    plane.exchange(meta(batches.steps), gradients, None, context.noise(batches.steps))
    return TrainingResult(batches.mean_loss, session)


def _views(context: RoundContext) -> list[int | None]:
    """Return the views that split training uses in this round, without repeats."""
    training = context.run.training
    epochs = range(training.local_epochs, training.local_epochs + training.split_epochs)
    return list(dict.fromkeys(context.view(epoch) for epoch in epochs))


def new_name(context: RoundContext) -> str:
    """Draw a new name for a session or for the steps of a round."""
    return f"{secrets.token_hex(4)}.{context.round}.{context.attempt}"


def train_tail(model: TorchModel, features: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Compute the mean loss of a batch and the gradients of features and tail.

    Args:
        model: its tail's parameters get their gradients.
        features: features [B, T', D].
        labels: classes, int64 [B].

    Returns:
        The mean cross-entropy in nats, and the gradient of the features, [B, T', D].

    Raises:
        Diverged: the loss or the gradient is not finite.
    """
    features = features.requires_grad_()
    loss = F.cross_entropy(model.tail(features), labels)
    parameters = [tensor for tensor in model.tail.parameters() if tensor.requires_grad]
    gradient, *gradients = torch.autograd.grad(loss, [features, *parameters])
    if not bool(torch.isfinite(gradient).all()) or not 0 <= loss.item() <= MAX_LOSS:
        raise Diverged(f"the training has diverged: the loss of a batch is {loss.item():g}")
    for parameter, value in zip(parameters, gradients, strict=True):
        parameter.grad = value
    return loss.item(), gradient


def correct_gradient(
    context: RoundContext, gradient: Tensor, smashed: Tensor, decoded: Tensor | None
) -> Tensor:
    """Correct the gradient of the smashed data for the codec's error.

    The server computes the gradient at the decoded smashed data. The correction adds
    ``wire.gradient_correction`` times the codec's error: it assumes a constant curvature.

    Args:
        context: the round.
        gradient: gradient at the decoded smashed data, [B, T, D].
        smashed: smashed data before encoding, [B, T, D].
        decoded: decoded smashed data, [B, T, D]; None: computed here.

    Returns:
        The gradient at the smashed data before encoding, [B, T, D].

    Source: FedLite (arXiv 2201.11865).
    """
    wire = context.run.wire
    if not wire.gradient_correction:
        return gradient
    if decoded is None:
        decoded = as_decoded(smashed, wire.smashed)
    return gradient + wire.gradient_correction * (smashed - decoded)


class SplitBatches:
    """The batches of a round's split training, and the mean loss of the last epoch.

    Args:
        context: the round.
        selected: positions of the samples, int64 [k].

    Attributes:
        steps: number of batches over all epochs.
    """

    def __init__(self, context: RoundContext, selected: Labels) -> None:
        training = context.run.training
        self._batches = context.batches("split", selected, training.split_epochs)
        self._last_epoch = training.split_epochs - 1
        self._samples = len(selected)
        self._loss_sum = 0.0
        self.steps = training.split_epochs * math.ceil(len(selected) / training.batch_size)

    def __iter__(self) -> Iterator[tuple[int, Labels]]:
        return self._batches

    def add_loss(self, epoch: int, loss: float, samples: int) -> None:
        """Add a batch's mean loss, if its epoch is the last one."""
        if epoch == self._last_epoch:
            self._loss_sum += loss * samples

    @property
    def mean_loss(self) -> float:
        return self._loss_sum / self._samples
