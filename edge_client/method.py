"""The device's side of a tuning method: what one round of training computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from edge_client.model import DeviceModel
from edge_client.training import (
    RoundContext,
    TrainingResult,
    inactive_neurons,
    local_update,
    select_samples,
    split_train,
    train_with_tuned_body,
)
from edge_client.transport import SplitPlane
from protocol.messages import NEURONS
from protocol.plan import RunPlan


@dataclass(frozen=True)
class RoundResult:
    """What the device reports about a round's training. The tuned state is in the model.

    Attributes:
        samples: number of selected samples, the update's weight.
        local_loss: mean cross-entropy of the local update's last epoch; None: there was none.
        train_loss: mean cross-entropy of split training's last epoch; None: there was none.
        session: names the prompts or the body that the server tuned for this device.
        extras: further tensors of the update, by name; sent as float32.
    """

    samples: int
    local_loss: float | None = None
    train_loss: float | None = None
    session: str | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class DeviceMethod:
    """SFPrompt's round (arXiv 2407.17533, section 3). Other methods override its steps."""

    def train_round(self, context: RoundContext, plane: SplitPlane) -> RoundResult:
        """Train one round: select samples, update locally, then train through the server.

        Raises:
            Diverged: a loss or a gradient is not finite.
            StaleRound: the server closed the round without this participant.
            StepLost: the server lost its state of this round; start the round again.
        """
        if context.round == 1 and context.run.model.prompt_init == "mean-token":
            context.model.add_mean_token(context.samples.images)
        selected = select_samples(context)
        local_loss = local_update(context, self.local_forward)
        result: TrainingResult | None = None
        if len(selected) and context.run.training.split_epochs:
            result = self.split_train(context, plane, selected)
        return RoundResult(
            samples=len(selected),
            local_loss=local_loss,
            train_loss=result.loss if result else None,
            session=result.session if result else None,
            extras=self.update_extras(context, selected),
        )

    def local_forward(self, model: DeviceModel, smashed: Tensor) -> Tensor:
        """Return the local update's logits [B, C] for smashed data [B, T, D]: body left out."""
        logits: Tensor = model.tail(smashed)
        return logits

    def split_train(
        self, context: RoundContext, plane: SplitPlane, selected: Tensor
    ) -> TrainingResult:
        """Train the selected samples [k] through the server's body."""
        return split_train(context, plane, selected)

    def update_extras(self, context: RoundContext, selected: Tensor) -> dict[str, Tensor]:
        """Return further float32 tensors for the update, computed on the selected samples [k]."""
        return {}


def device_method(plan: RunPlan) -> DeviceMethod:
    """Return the device's side of the plan's tuning method."""
    special = plan.model.local_body or plan.model.tune_body or plan.distillation.every
    return _SpecialCases() if special else DeviceMethod()


class _SpecialCases(DeviceMethod):
    """Selects by the plan what differs from SFPrompt's round; each case is a function below."""

    def local_forward(self, model: DeviceModel, smashed: Tensor) -> Tensor:
        if model.local_body is not None:
            smashed = _through_local_body(model, smashed)
        return super().local_forward(model, smashed)

    def split_train(
        self, context: RoundContext, plane: SplitPlane, selected: Tensor
    ) -> TrainingResult:
        if context.run.model.tune_body:
            return _split_train_tuned_body(context, plane, selected)
        return super().split_train(context, plane, selected)

    def update_extras(self, context: RoundContext, selected: Tensor) -> dict[str, Tensor]:
        if context.run.distillation.every:
            return _inactive_neuron_extras(context, selected)
        return super().update_extras(context, selected)


def _through_local_body(model: DeviceModel, smashed: Tensor) -> Tensor:
    """Local body: the local update runs through a small frozen body on the device."""
    if model.local_body is None:
        raise ValueError("the run has no local body: model.local_body is 0")
    features: Tensor = model.local_body(smashed)  # [B, T, D]
    return features


def _split_train_tuned_body(
    context: RoundContext, plane: SplitPlane, selected: Tensor
) -> TrainingResult:
    """Tuned body: the server tunes a copy of the body for each participant."""
    return train_with_tuned_body(context, plane, selected)


def _inactive_neuron_extras(context: RoundContext, selected: Tensor) -> dict[str, Tensor]:
    """Pruned proxy: in rounds before a redistillation, report how often neurons are inactive."""
    if not context.run.distillation.due(context.round, context.run.federation.rounds):
        return {}
    return {NEURONS: inactive_neurons(context, selected)}
