"""Building one part without allocating the others."""

from collections.abc import Mapping

import torch
from torch import Tensor

from split_model.body import Body
from split_model.head import Head
from split_model.settings import SplitSettings
from split_model.tail import Tail


def build_head(settings: SplitSettings, tensors: Mapping[str, Tensor]) -> Head:
    """The frozen head, float32 on the CPU, from a mapping of timm's names.

    Only its own tensors are read. Raises `UnsupportedBackboneError`, `SplitSettingsError` or
    `WeightsMismatchError`.
    """
    head = Head(settings)
    head.fill(tensors)
    return head


def build_body(
    settings: SplitSettings,
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Body:
    """The frozen body on `device` in `dtype`; raises as `build_head` does."""
    body = Body(settings)
    body.fill(tensors, device, dtype)
    return body


def build_tail(settings: SplitSettings, tensors: Mapping[str, Tensor]) -> Tail:
    """The tail, float32 on the CPU, ready to be trained; raises as `build_head` does.

    `tensors` holds timm's names, the classifier's among them.
    """
    tail = Tail(settings)
    # A copy: training must not write into the mapping's tensors.
    tail.fill({name: tensors[name].clone() for name in tail.names() if name in tensors})
    for parameter in tail.parameters():
        parameter.requires_grad_(True)
    return tail


def head_names(settings: SplitSettings) -> list[str]:
    """timm's names of the tensors that the head reads."""
    return list(Head(settings).names())


def body_names(settings: SplitSettings) -> list[str]:
    """timm's names of the tensors that the body reads."""
    return list(Body(settings).names())


def tail_names(settings: SplitSettings) -> list[str]:
    """timm's names of the tensors that the tail reads, the classifier's included."""
    return list(Tail(settings).names())
