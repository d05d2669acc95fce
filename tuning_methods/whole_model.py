"""The base of methods without a split: the device trains the whole model.

A cut behind the last block leaves an empty body. A round's whole training is the local-loss update,
head to tail.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from protocol.method import Fields, MethodSettings
from protocol.parts import BackboneSettings
from protocol.plan import ModelPlan

if TYPE_CHECKING:
    from protocol.settings import RunSettings
    from split_model.backbone.architecture import Anatomy


class WholeModel(MethodSettings, ABC):
    """Base class of the settings of methods that train the whole model on the device."""

    epochs: int = Field(
        1, ge=1, le=10_000, description="epochs a round over all samples of the device"
    )

    rates: ClassVar[dict[str, Any]] = {"tail_learning_rate": 2e-2}  # the method's defaults

    # Stands for `shape_part` in checks without the backbone, which any shape allows.
    stand_in: ClassVar[Fields] = {"cut": 1}

    def defaults(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        shared = {"batch_size": 8, "prompt_learning_rate": 1e-2, "warmup_rounds": 1}
        return {"training": shared | self.rates}

    @abstractmethod
    def tuning_part(self, settings: RunSettings) -> Fields:
        """Return the fields of `ModelPlan` that do not depend on the backbone's shape."""

    def shape_part(self, settings: RunSettings) -> Fields:
        """Return the fields of `ModelPlan` that depend on the backbone's shape; may import torch.

        Raises:
            InvalidField: timm has no such architecture, or it cannot be cut.
        """
        return {"cut": anatomy_of(settings.model).depth}

    def model_part(self, settings: RunSettings) -> Fields:
        return self._unshaped(settings) | self.shape_part(settings)

    def check(self, settings: RunSettings) -> None:
        self.resolve(settings, self._unshaped(settings) | self.stand_in)

    def training_part(self, settings: RunSettings) -> Fields:
        return {
            "local_epochs": self.epochs,
            "split_epochs": 0,
            "keep_fraction": 1.0,
            "local_learning_rate_scale": 1.0,
        }

    def _unshaped(self, settings: RunSettings) -> Fields:
        without_prompts = {"prompt_at": "input", "prompt_depth": "shallow", "prompt_count": 0}
        return without_prompts | self.tuning_part(settings)


def anatomy_of(model: BackboneSettings) -> Anatomy:
    """Read the sizes of a whole backbone.

    Raises:
        InvalidField: timm has no such architecture, or it cannot be cut.
    """
    # Imports torch, which parsing settings must not do.
    from split_model.backbone.architecture import anatomy

    return anatomy(ModelPlan(**model.model_dump(), cut=0, prompt_count=0))
