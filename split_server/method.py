"""The server's side of a tuning method: the one interface through which the core asks a method.

A method's package overrides what differs from SFPrompt's default form. The core calls these hooks
and knows no method by name.
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
from split_model import BackboneFile, part_bytes
from split_server.engine.handler import HandlerFactory
from split_server.storage.run_files import RunFiles, StateRefs

if TYPE_CHECKING:
    from split_server.http.handlers import Handler


@dataclass(frozen=True)
class ModelFiles:
    """The weights of a run's model.

    Attributes:
        weights: the file with the weights: the backbone's, or of a model made from it.
        extras: further frozen tensors of the head file, for the device's side of the method.
    """

    weights: Path
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelForExport:
    """What is exported: the tuned state and the weights that it belongs to."""

    plan: ModelPlan
    weights: Path
    state: Mapping[str, Tensor]
    uses_head_file: bool  # whether the frozen head is as devices have it


@dataclass(frozen=True)
class Rebuild:
    """A run whose model is made again between two rounds.

    Attributes:
        round: the last closed round.
        state: the global state of this round.
        weights: the weights of the run's model in this round.
        check: called regularly; an exception from it ends the work.
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
    """The model files of a run after `ServerMethod.rebuild`."""

    weights: Path
    head: BlobRef


class ServerMethod:
    """The defaults: one frozen body for all participants, prompts and tail in the global state.

    Attributes:
        job_handlers: further handlers of the engine, for jobs of this method's own types.
        handlers: by kind of request, what replaces the split plane's own handler.
    """

    job_handlers: ClassVar[Sequence[HandlerFactory]] = ()

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {}

    def has_own_bodies(self, plan: RunPlan) -> bool:
        """Whether each participant trains a body of its own, which no batch is shared through."""
        return False

    # Model files

    def check(self, plan: RunPlan) -> None:
        """Refuse a plan that the backbone does not fit, before any work.

        Raises:
            InvalidField: names the field.
        """
        part_bytes(plan.model)

    def backbone_bytes(self, plan: RunPlan) -> int:
        """The size of the uncut pretrained model with its classifier, in float32."""
        return part_bytes(plan.model).backbone_bytes

    def prepare(self, plan: RunPlan, backbone: BackboneFile, cache_dir: Path) -> ModelFiles:
        """Make the weights of the run's model. May take minutes; never on the event loop.

        Raises:
            InvalidField: they cannot be made.
        """
        return ModelFiles(backbone.path)

    def for_export(
        self, plan: RunPlan, weights: Path, state: Mapping[str, Tensor], cache_dir: Path
    ) -> ModelForExport:
        """Decide what is exported of a run with these weights and this global state."""
        return ModelForExport(plan.model, weights, state, uses_head_file=True)

    # Updates

    def extra_shapes(self, plan: RunPlan, round_: int) -> Mapping[str, tuple[int, ...]]:
        """The shapes of further tensors in the updates of this round, by name."""
        return {}

    def decode_extras(self, plan: RunPlan, round_: int, frame: Frame) -> dict[str, Tensor]:
        """Decode and check an update's further tensors; their mean is stored with the round.

        Raises:
            WrongShape, InvalidField, NonFinite
        """
        return {}

    # Between rounds

    def is_rebuild_due(self, plan: RunPlan, round_: int) -> bool:
        """Whether the model is made again after this round."""
        return False

    def rebuild(self, work: Rebuild) -> RebuiltModel:
        """Make the run's model again; the next round waits for it. Takes minutes.

        Interrupted work is repeated with the same result.

        Raises:
            InvalidField, NonFinite, NotFound: the run ends with this reason.
        """
        raise NotImplementedError("is_rebuild_due is never true")


def server_method(settings: RunSettings) -> ServerMethod:
    """Return the server's side of the run's tuning method."""
    method: ServerMethod = settings.method.side("server")()
    return method


def all_job_handlers() -> list[HandlerFactory]:
    """The engine's further handlers of all installed methods, each once."""
    sides = (load_class(method_class(name).server) for name in method_names())
    return list(dict.fromkeys(factory for side in sides for factory in side.job_handlers))
