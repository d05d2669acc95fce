"""What methods without a split have in common: the device holds the whole model.

A cut behind the last block leaves an empty body. The local-loss update, head to tail, is the whole
training of a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from protocol.method import Fields, MethodSettings
from protocol.parts import BackboneSettings
from protocol.plan import ModelPlan

if TYPE_CHECKING:
    from protocol.settings import RunSettings
    from split_model import Anatomy


class WholeModel(MethodSettings):
    """Base of the settings of methods that train a whole model on the device."""

    epochs: int = Field(1, ge=1, le=10_000, description="over all samples of a device, in a round")

    # As in the paper's form of SFPrompt: the schedule is a run's, the rates are the method's own.
    rates: ClassVar[dict[str, Any]] = {"tail_learning_rate": 2e-2}

    def defaults(self) -> dict[str, dict[str, Any]]:
        shared = {"batch_size": 8, "prompt_learning_rate": 1e-2, "warmup_rounds": 1}
        return {"training": shared | self.rates}

    def tuned(self, settings: RunSettings) -> Fields:
        """What is tuned, as fields of `ModelPlan`. Must not need the backbone's shape."""
        raise NotImplementedError

    def shaped(self, settings: RunSettings) -> Fields:
        """Fields of `ModelPlan` that follow from the backbone's shape; may import torch."""
        return {"cut": depth_of(settings.model)}

    def model_part(self, settings: RunSettings) -> Fields:
        return self._unshaped(settings) | self.shaped(settings)

    def check(self, settings: RunSettings) -> None:
        # The depth needs the backbone; any cut allows the other checks.
        self.resolve(settings, self._unshaped(settings) | {"cut": 1})

    def training_part(self) -> Fields:
        return {
            "local_epochs": self.epochs,
            "split_epochs": 0,
            "keep_fraction": 1.0,
            "local_learning_rate_scale": 1.0,
        }

    def _unshaped(self, settings: RunSettings) -> Fields:
        plain = {"prompt_at": "input", "prompt_depth": "shallow", "prompt_count": 0}
        return plain | dict(self.tuned(settings))


def depth_of(model: BackboneSettings, **proxy: Any) -> int:
    """The blocks of a backbone, or of a proxy of it (fields of `ModelPlan`).

    Raises:
        InvalidField: timm has no such architecture, or it cannot be cut.
    """
    return _anatomy(model, **proxy).depth


def width_of(model: BackboneSettings) -> int:
    """The numbers of a token of a backbone. Raises as `depth_of` does."""
    return _anatomy(model).width


def _anatomy(model: BackboneSettings, **proxy: Any) -> Anatomy:
    # Imports torch, which parsing settings must not.
    from split_model import anatomy

    return anatomy(ModelPlan(**model.model_dump(), cut=0, prompt_count=0, **proxy))
