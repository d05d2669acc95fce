"""The sizes of the parts, computed without allocating them."""

import dataclasses
import math

from torch import nn

from protocol.plan import ModelPlan
from split_model.backbone.architecture import skeleton
from split_model.layers.prompts import prompt_shape
from split_model.parts.body import Body
from split_model.parts.depths import make_tail
from split_model.parts.head import Head


@dataclasses.dataclass(frozen=True)
class PartBytes:
    """The number of scalars in each part, buffers of its state included.

    `backbone` is the whole timm model with the plan's classifier. Positions that parts share
    count in each of them.
    """

    head: int
    body: int
    tail: int
    prompts: int
    backbone: int

    @property
    def backbone_bytes(self) -> int:
        """Bytes of the whole model in float32."""
        return 4 * self.backbone


def part_bytes(settings: ModelPlan) -> PartBytes:
    """Compute the sizes of a cut backbone.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        ModelPlanError: the plan does not fit the backbone.
    """
    return PartBytes(
        head=_numbers(Head(settings)),
        body=_numbers(Body(settings)),
        tail=_numbers(make_tail(settings)),
        prompts=math.prod(prompt_shape(settings)),
        backbone=_numbers(skeleton(settings)),
    )


def _numbers(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
