"""The server's side of a tuning method: the interface between the server and a method.

A method's package overrides the hooks in which it differs from SFPrompt's default form. The server
calls the hooks and knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from protocol.frames import Frame
from protocol.messages import BlobRef
from protocol.method import load_class, method_class, method_names
from protocol.plan import ModelPlan, RunPlan
from protocol.settings import RunSettings
from split_model.backbone.weights import BackboneFile
from split_model.errors import ModelPlanError
from split_model.parts.cost import part_bytes
from split_server.engine.handler import HandlerFactory
from split_server.storage.run_files import RunFiles, StateRefs

if TYPE_CHECKING:
    from split_server.http.handlers import Handler


@dataclass(frozen=True)
class ModelFiles:
    """The weights of a run's model.

    Attributes:
        weights: file of the backbone's weights, or of those made from them.
        extras: further frozen tensors of the head file, by name, for the method's device side.
    """

    weights: Path
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelForExport:
    """The tuned state to export, and the weights that it belongs to.

    Attributes:
        plan: the exported model's plan.
        weights: file of the frozen weights.
        state: the tuned state.
        uses_head_file: whether the frozen head is the one in the devices' head file.
    """

    plan: ModelPlan
    weights: Path
    state: Mapping[str, Tensor]
    uses_head_file: bool


@dataclass(frozen=True)
class Rebuild:
    """A run whose model is rebuilt between two rounds.

    Attributes:
        plan: the run's plan.
        files: the run's files.
        cache_dir: folder of backbones and of weights made from them.
        round: the last closed round.
        state: the global state after this round.
        weights: file of the model's weights in this round.
        check: call regularly; an exception from it ends the work.
    """

    plan: RunPlan
    files: RunFiles
    cache_dir: Path
    round: int
    state: StateRefs
    weights: Path
    check: Callable[[], None]


@dataclass(frozen=True)
class RebuiltModel:
    """The model files of a run after `ServerMethod.rebuild`.

    Attributes:
        weights: file of the model's weights.
        head: the new head file.
    """

    weights: Path
    head: BlobRef


@dataclass(frozen=True)
class RoundMean:
    """The mean of a round's updates, weighted by their samples.

    Attributes:
        round: its number, from 1.
        samples: of all updates.
        state: mean of the updates' states, by name.
        extras: mean of their further tensors, by name.
    """

    round: int
    samples: int
    state: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]


class ServerMethod:
    """SFPrompt's default form: a frozen body for all participants; prompts and tail are averaged.

    Attributes:
        job_handlers: further handlers of the engine, for this method's types of jobs.
    """

    job_handlers: ClassVar[Sequence[HandlerFactory]] = ()

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """The handlers that replace the split plane's, by kind of request."""
        return {}

    def has_tuned_bodies(self, plan: RunPlan) -> bool:
        """Whether the server tunes a body for each participant, so that they share no batch."""
        return False

    def steps_classifier(self, plan: RunPlan) -> bool:
        """Whether an update after round 0 is `local_epochs` steps of the linear tail.

        The server then computes these steps itself, and refuses other updates.
        """
        return bool(plan.model.depths and not plan.training.split_epochs)

    # Model files

    def check(self, plan: RunPlan) -> None:
        """Check before any work that the plan fits the backbone.

        Raises:
            InvalidField: a field of the plan does not fit.
        """
        part_bytes(plan.model)

    def backbone_bytes(self, plan: RunPlan) -> int:
        """Return the bytes of the uncut pretrained model with its classifier, in float32."""
        return part_bytes(plan.model).backbone_bytes

    def prepare(self, plan: RunPlan, backbone: BackboneFile, cache_dir: Path) -> ModelFiles:
        """Return the weights of the run's model, computed if needed.

        May take minutes; never called on the event loop.

        Args:
            plan: the run's plan.
            backbone: the backbone's file.
            cache_dir: folder of backbones and of weights made from them.

        Raises:
            InvalidField: the weights cannot be computed from this plan.
        """
        if plan.model.is_reshaped:
            field = "blocks" if plan.model.blocks else "mlp_widths"
            limit = "empty: the run's method makes no weights for other blocks than the backbone's"
            raise ModelPlanError(field, limit, getattr(plan.model, field))
        return ModelFiles(backbone.path)

    def prepare_export(
        self, plan: RunPlan, weights: Path, state: Mapping[str, Tensor], cache_dir: Path
    ) -> ModelForExport:
        """Return the model to export from a run's weights and its global state."""
        return ModelForExport(plan.model, weights, state, uses_head_file=True)

    # Updates

    def extra_shapes(self, plan: RunPlan, round_: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of further tensors in the updates of this round, by name."""
        return {}

    def decode_extras(self, plan: RunPlan, round_: int, frame: Frame) -> dict[str, Tensor]:
        """Decode and check an update's further tensors; the server stores their mean.

        Raises:
            WrongShape: a tensor is missing or has another shape.
            InvalidField: a value is outside its limits.
            NonFinite: a tensor contains NaN or infinity.
        """
        return {}

    def next_state(self, plan: RunPlan, mean: RoundMean) -> dict[str, Tensor]:
        """Return the state that the updates of a round result in; the server optimiser follows.

        Raises:
            SFPromptError: the run ends with this error.
        """
        return dict(mean.state)

    # Between rounds

    def is_rebuild_due(self, plan: RunPlan, round_: int) -> bool:
        """Whether the model is rebuilt after this round."""
        return False

    def rebuild(self, work: Rebuild) -> RebuiltModel:
        """Rebuild the run's model, which may take minutes; the next round starts afterwards.

        After an interruption the work is repeated, with the same result.

        Raises:
            InvalidField, NonFinite, NotFound: the run ends with this error.
        """
        raise NotImplementedError("a method with is_rebuild_due must define rebuild")


def server_method(settings: RunSettings) -> ServerMethod:
    """Return the server's side of the run's tuning method."""
    method: ServerMethod = settings.method.load_side("server")()
    return method


def list_job_handlers() -> list[HandlerFactory]:
    """List the further job handlers of all installed methods, without duplicates."""
    sides = (load_class(method_class(name).server) for name in method_names())
    return list(dict.fromkeys(factory for side in sides for factory in side.job_handlers))
