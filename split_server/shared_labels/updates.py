"""What a device would compute of its features and labels: updates and evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from protocol.messages import MAX_LOSS, EvaluationReport, UpdateMeta
from protocol.plan import RunPlan
from split_model.linear_fit import Features, Fit, penalised_loss, scale_fit, step_classifier
from split_model.predictions import PredictionCounter
from split_server.federation.snapshot import OpenRound
from split_server.storage.run_files import TAIL_BIAS, TAIL_WEIGHT

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """An update: its meta part and its tensors."""

    meta: UpdateMeta
    state: State


def start_update(
    open_round: OpenRound, fit: Fit, features: Tensor, labels: Tensor
) -> tuple[Update, float]:
    """Scale the classifier of round 0 to a participant's samples.

    Args:
        open_round: round 0.
        fit: its classifier.
        features: of the participant's samples, [n, r].
        labels: [n].

    Returns:
        The update, and the penalty of its later steps.
    """
    factor, loss, decay = scale_fit(fit, features.numpy(), labels.numpy())
    meta = _meta(open_round, len(labels)).model_copy(update={"train_loss": loss})
    return Update(meta, _state(factor * fit.weight, factor * fit.bias)), decay


def step_update(
    open_round: OpenRound,
    state: State,
    features: Features,
    labels: Tensor,
    decay: float,
    steps: int,
) -> Update:
    """Move the classifier by the steps of one round.

    Args:
        open_round: a round after round 0.
        state: global state before it.
        features: of the participant's samples.
        labels: [n].
        decay: from round 0.
        steps: `local_epochs`.
    """
    weight, bias = (state[name].double().numpy() for name in (TAIL_WEIGHT, TAIL_BIAS))
    loss = 0.0
    for _ in range(steps):
        (weight, bias), loss = step_classifier(weight, bias, features, labels.numpy(), decay)
    meta = _meta(open_round, len(labels)).model_copy(update={"local_loss": min(loss, MAX_LOSS)})
    return Update(meta, _state(weight, bias))


def report(
    open_round: OpenRound,
    plan: RunPlan,
    state: State,
    held_out: tuple[Tensor, Tensor],
    train: tuple[Features, Tensor, float] | None,
) -> EvaluationReport:
    """Measure a global state on a participant's samples.

    Args:
        open_round: in evaluation.
        plan: of the run.
        state: to measure.
        held_out: features [m, r] and labels [m] of the test samples.
        train: features, labels [n] and penalty of the training samples; None: there are none.
    """
    weight, bias = state[TAIL_WEIGHT], state[TAIL_BIAS]
    features, labels = held_out
    logits = features @ weight.T + bias
    loss_sum = F.cross_entropy(logits, labels, reduction="sum").item()
    counter = PredictionCounter()
    if len(labels):
        counter.add(logits.softmax(dim=1).numpy(), labels.numpy())
    has_diverged = not 0 <= loss_sum <= MAX_LOSS * len(labels)
    selection = None
    if train is not None and plan.selects_states:
        seen, own_labels, decay = train
        loss = penalised_loss(weight.numpy(), bias.numpy(), seen, own_labels.numpy(), decay)
        selection = min(loss, MAX_LOSS) if loss == loss else MAX_LOSS
    return EvaluationReport(
        round=open_round.round,
        attempt=open_round.attempt,
        samples=0 if has_diverged else len(labels),
        correct=0 if has_diverged else int((logits.argmax(dim=1) == labels).sum()),
        loss_sum=0.0 if has_diverged else loss_sum,
        selection_loss=selection,
        selection_samples=0 if selection is None or train is None else len(train[1]),
        predictions=counter.counts()
        if plan.training.reports_classes and not has_diverged
        else None,
    )


def _state(weight: NDArray[np.floating], bias: NDArray[np.floating]) -> State:
    arrays = {TAIL_WEIGHT: weight, TAIL_BIAS: bias}
    return {name: torch.from_numpy(array).float() for name, array in arrays.items()}


def _meta(open_round: OpenRound, samples: int) -> UpdateMeta:
    return UpdateMeta(round=open_round.round, attempt=open_round.attempt, samples=samples)
