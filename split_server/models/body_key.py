"""The key under which a frozen body is shared, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

import split_model
from protocol.plan import ModelPlan, RunPlan


@dataclass(frozen=True)
class BodyKey:
    """Which body: jobs of equal keys may be computed together.

    ``state`` is the file of what was tuned of it, where a run tunes its body.
    """

    backbone: Path
    settings: ModelPlan
    state: Path | None = None

    @classmethod
    def of(cls, backbone: str, settings: RunPlan) -> BodyKey:
        """The body of a run. What shapes only its tail is left out, so that runs can share."""
        shared = {"num_classes": 2, "weights": "packaged", "prompt_init": "normal"}
        model = settings.model.model_copy(update=shared)
        return cls(Path(backbone), model)

    def __hash__(self) -> int:  # taken several times a job, of some thirty values
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.backbone, self.settings, self.state))

    @cached_property
    def weights(self) -> tuple[object, ...]:
        """What decides the weights: bodies that differ only in their prompts share them."""
        s = self.settings
        sizes = s.backbone, s.image_size, s.cut, s.tail_blocks, s.model_overrides
        return self.backbone, self.state, *sizes

    @property
    def unstated(self) -> BodyKey:
        """The same body, whatever was tuned of it: what tells the sizes alone."""
        return replace(self, state=None)


def weights_of(key: BodyKey) -> Mapping[str, Tensor]:
    """The weights of a body by timm's names, each read when asked for.

    Raises what `split_model.open_backbone` and `split_model.load_state` raise.
    """
    backbone = split_model.open_backbone(key.backbone)
    if key.state is None:
        return backbone
    tuned = split_model.body_tensors(split_model.load_state(key.state))
    return split_model.Layered(tuned, backbone)
