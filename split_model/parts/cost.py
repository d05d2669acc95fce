"""How large each part is and what it computes, found without memory for any of them."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from split_model.backbone.architecture import skeleton
from split_model.layers.prompts import prompt_shape
from split_model.parts.body import Body
from split_model.parts.head import Head
from split_model.parts.tail import Tail
from split_model.settings import SplitSettings


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


def part_bytes(settings: SplitSettings) -> PartBytes:
    """The sizes of a cut backbone. Raises `UnsupportedBackboneError` or `SplitSettingsError`."""
    return PartBytes(
        head=_numbers(Head(settings)),
        body=_numbers(Body(settings)),
        tail=_numbers(Tail(settings)),
        prompts=math.prod(prompt_shape(settings)),
        backbone=_numbers(skeleton(settings)),
    )


@dataclasses.dataclass(frozen=True)
class PartFlops:
    """Floating-point operations of each part's forward pass for one image.

    A multiplication and its addition count as two, as torch's counter has it; only matrix
    products, convolutions and attention count. With prompts where the settings have them.
    """

    head: int
    body: int
    tail: int
    backbone: int  # the uncut model, without prompts


def part_flops(settings: SplitSettings) -> PartFlops:
    """The forward costs of a cut backbone. Raises as `part_bytes` does."""
    side = settings.image_size
    images = torch.empty(1, 3, side, side, device="meta")
    prompts: Tensor | None = None
    if settings.prompt_count:
        prompts = torch.empty(prompt_shape(settings), device="meta")
    at_input = settings.prompt_at == "input"
    head, body, tail = Head(settings), Body(settings), Tail(settings)
    smashed, head_flops = _counted(lambda: head(images, prompts if at_input else None))
    features, body_flops = _counted(lambda: body(smashed, None if at_input else prompts))
    _, tail_flops = _counted(lambda: tail(features))
    uncut = skeleton(settings)
    _, backbone_flops = _counted(lambda: uncut(images))
    return PartFlops(head_flops, body_flops, tail_flops, backbone_flops)


def _counted(step: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = step()
    return result, int(counter.get_total_flops())


def _numbers(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
