"""The key under which runs share a frozen body, and the body's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from protocol.plan import ModelPlan, RunPlan
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.state import body_tensors, load_state
from split_model.parts.build import Layered


@dataclass(frozen=True)
class BodyKey:
    """Identifies a body; jobs with equal keys may share a batch.

    ``state`` is the file with the body's tuned tensors, in runs that tune their body.
    """

    backbone: Path
    settings: ModelPlan
    state: Path | None = None

    @classmethod
    def of(cls, backbone: str, plan: RunPlan) -> BodyKey:
        """Return the key of a run's body, without the settings that affect only its tail."""
        model = plan.model.model_copy(update={"num_classes": 2})
        return cls(Path(backbone), model)

    def __hash__(self) -> int:  # cached: computed several times per job over thirty values
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.backbone, self.settings, self.state))

    @cached_property
    def weights(self) -> tuple[object, ...]:
        """The part of the key that the weights depend on; bodies differing in prompts share it."""
        settings = self.settings
        sizes = (
            settings.backbone,
            settings.image_size,
            settings.cut,
            settings.tail_blocks,
            settings.blocks,
            settings.mlp_widths,
            settings.model_overrides,
        )
        return self.backbone, self.state, *sizes

    @property
    def unstated(self) -> BodyKey:
        """The key without the tuned state, for uses that depend on the sizes alone."""
        return replace(self, state=None)


def weights_of(key: BodyKey) -> Mapping[str, Tensor]:
    """Return a body's weights by timm's names, each read on access.

    Raises:
        TensorFileError: as `open_backbone` and `load_state` raise it.
    """
    backbone = open_backbone(key.backbone)
    if key.state is None:
        return backbone
    tuned = body_tensors(load_state(key.state))
    return Layered(tuned, backbone)
