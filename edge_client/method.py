"""The device's side of a tuning method: what one round of training computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from edge_client.model import DeviceModel
from edge_client.training import (
    RoundContext,
    TrainingResult,
    local_update,
    select_samples,
    split_train,
)
from edge_client.transport import SplitPlane
from protocol.settings import RunSettings


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


def device_method(settings: RunSettings) -> DeviceMethod:
    """Return the device's side of the run's tuning method."""
    method: DeviceMethod = settings.method.load_side("device")()
    return method
