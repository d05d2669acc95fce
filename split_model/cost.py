"""How large each part is, computed without memory for any of them."""

import dataclasses
import math

from torch import nn

from split_model.architecture import skeleton
from split_model.body import Body
from split_model.head import Head
from split_model.prompts import prompt_shape
from split_model.settings import SplitSettings
from split_model.tail import Tail


@dataclasses.dataclass(frozen=True)
class PartBytes:
    """Numbers in each part, and their float32 bytes.

    A part's tensors, buffers of its state included. `backbone` is the whole timm model with the
    settings' classifier. Positions that parts share count in each.
    """

    head: int
    body: int
    tail: int
    prompts: int
    backbone: int
    itemsize: int = 4

    @property
    def head_bytes(self) -> int:
        return self.head * self.itemsize

    @property
    def body_bytes(self) -> int:
        return self.body * self.itemsize

    @property
    def tail_bytes(self) -> int:
        return self.tail * self.itemsize

    @property
    def prompts_bytes(self) -> int:
        return self.prompts * self.itemsize

    @property
    def backbone_bytes(self) -> int:
        return self.backbone * self.itemsize


def part_bytes(settings: SplitSettings) -> PartBytes:
    """The sizes of a cut backbone. Raises `UnsupportedBackboneError` or `SplitSettingsError`."""
    return PartBytes(
        head=_numbers(Head(settings)),
        body=_numbers(Body(settings)),
        tail=_numbers(Tail(settings)),
        prompts=math.prod(prompt_shape(settings)),
        backbone=_numbers(skeleton(settings)),
    )


def _numbers(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
