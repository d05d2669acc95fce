"""How large each part is and what it computes, found without memory for any of them."""

import dataclasses
import math

from torch import nn

from protocol.plan import ModelPlan
from split_model.backbone.architecture import skeleton
from split_model.layers.prompts import prompt_shape
from split_model.parts.body import Body
from split_model.parts.head import Head
from split_model.parts.tail import Tail


@dataclasses.dataclass(frozen=True)
class PartBytes:
    """Numbers in each part.

    A part's tensors, buffers of its state included. `backbone` is the whole timm model with the
    settings' classifier. Positions that parts share count in each.
    """

    head: int
    body: int
    tail: int
    prompts: int
    backbone: int

    @property
    def backbone_bytes(self) -> int:
        """Of the whole model in float32."""
        return 4 * self.backbone


def part_bytes(settings: ModelPlan) -> PartBytes:
    """The sizes of a cut backbone. Raises `UnsupportedBackboneError` or `ModelPlanError`."""
    return PartBytes(
        head=_numbers(Head(settings)),
        body=_numbers(Body(settings)),
        tail=_numbers(Tail(settings)),
        prompts=math.prod(prompt_shape(settings)),
        backbone=_numbers(skeleton(settings)),
    )


def _numbers(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
