"""The device's side of a tuning method: what one round of training computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_client.data.image_set import Labels
from edge_client.training import (
    RoundContext,
    Samples,
    classifier_loss,
    evaluate,
    fit_start,
    tune_classifier,
)
from edge_client.transport.split_client import SplitPlane
from protocol.plan import RunPlan
from protocol.settings import RunSettings

# Gradients need torch, which a device that refines a classifier alone need not have. The functions
# that compute them import their modules themselves.
if TYPE_CHECKING:
    from torch import Tensor

    from edge_client.training.split_training import Sample, TrainingResult
    from protocol.arrays import Array


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
    extras: Mapping[str, Array] = field(default_factory=dict)


class DeviceMethod:
    """SFPrompt's round (arXiv 2407.17533, section 3). Other methods override its steps."""

    def train_round(self, context: RoundContext, plane: SplitPlane) -> RoundResult:
        """Train one round: select samples, update locally, then train through the server.

        Raises:
            Diverged: a loss or a gradient is not finite.
            StaleRound: the server closed the round without this participant.
            StepLost: the server lost its state of this round; start the round again.
        """
        if context.round == 0:
            start = fit_start(context, plane)
            return RoundResult(samples=start.samples, train_loss=start.loss)
        if context.run.model.depths and not context.run.training.split_epochs:
            loss = tune_classifier(context, plane)
            return RoundResult(samples=len(context.samples), local_loss=loss)
        return self._train_by_gradients(context, plane)

    def _train_by_gradients(self, context: RoundContext, plane: SplitPlane) -> RoundResult:
        from edge_client.torch_model import model_of
        from edge_client.training.local_update import local_update
        from edge_client.training.selection import select_samples

        if context.round == 1 and context.run.model.prompt_init == "mean-token":
            model_of(context).add_mean_token(context.samples.images)
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

    def selection_loss(
        self, context: RoundContext, plane: SplitPlane, validation: Samples | None, state: str
    ) -> tuple[float, int] | None:
        """Return the loss of the global state in the model by which the server selects states.

        Args:
            context: of the round that produced the state.
            plane: the run's.
            validation: samples that are not trained on; None: the run has none.
            state: hash of the state.

        Returns:
            The mean loss and the number of samples; None: this device cannot tell.

        Raises:
            StaleRound: the server's global state is another one.
        """
        if context.run.model.depths and not context.run.training.split_epochs:
            return classifier_loss(context, plane), len(context.samples)
        if validation is None or not len(validation):
            return None
        measured = evaluate(
            context.model,
            plane,
            validation,
            step=f"select.{context.round}",
            round_=context.round,
            advance=context.advance,
            state=state,
        )
        return measured.loss_sum / measured.samples, measured.samples

    def local_forward(self, context: RoundContext, smashed: Tensor) -> Tensor:
        """Return the local update's logits [B, C] for smashed data [B, T, D]: body left out."""
        from edge_client.torch_model import model_of

        logits: Tensor = model_of(context).tail(smashed)
        return logits

    def split_train(
        self, context: RoundContext, plane: SplitPlane, selected: Labels
    ) -> TrainingResult:
        """Train the selected samples [k] through the server's body."""
        from edge_client.training.split_training import split_train

        fixed_views = self.uses_fixed_views(context.run)
        return split_train(context, plane, selected, self.forward, fixed_views=fixed_views)

    def forward(
        self,
        context: RoundContext,
        plane: SplitPlane,
        samples: Sequence[Sample],
        smashed: Tensor,
        step: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Send a step's smashed data [B, T, D], with prompts at the input.

        Args:
            context: the round.
            plane: the run's.
            samples: each sample's position in the set and augmented view, [B].
            smashed: their smashed data, without a graph.
            step: the step's name, unique in the run; an attempt to send it again has another.

        Returns:
            The features [B, T', D], and the smashed data [B, T, D] as the server decodes them;
            None: as ``wire.smashed`` decodes them.

        Raises:
            SamplesMissing: the server lacks samples that were not sent whole; the step is tried
                again.
        """
        from edge_client.training.split_training import forward_whole

        return forward_whole(context, plane, samples, smashed, step)

    def uses_fixed_views(self, run: RunPlan) -> bool:
        """Whether `forward` needs samples in a fixed number of augmented views."""
        return False

    def drop_sample_caches(self) -> None:
        """Drop caches by sample: the set has lost unreadable images, and positions have changed."""

    def update_extras(self, context: RoundContext, selected: Labels) -> Mapping[str, Array]:
        """Return further float32 tensors for the update, computed on the selected samples [k]."""
        return {}


def device_method(settings: RunSettings) -> DeviceMethod:
    """Return the device's side of the run's tuning method."""
    method: DeviceMethod = settings.method.load_side("device")()
    return method
