"""Building one part without allocating the others."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.layers.bfloat16 import activation_dtype, multiply_in_bfloat16
from split_model.parts.base import Part
from split_model.parts.body import Body
from split_model.parts.head import Head
from split_model.parts.tail import Tail


class Layered(Mapping[str, Tensor]):
    """Tensors by name, each from the first of these mappings that has it, when asked for."""

    def __init__(self, *layers: Mapping[str, Tensor]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> Tensor:
        for layer in self._layers:
            if name in layer:
                return layer[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:  # without reading it
        return any(name in layer for layer in self._layers)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for layer in self._layers for name in layer))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def build_head(settings: ModelPlan, tensors: Mapping[str, Tensor]) -> Head:
    """The head, float32 on the CPU, from a mapping of timm's names; what is tuned, trainable.

    Only its own tensors are read. Raises `UnsupportedBackboneError`, `ModelPlanError` or
    `WeightsMismatchError`.
    """
    head = Head(settings)
    head.fill(tensors)
    _free(head)
    return head


def build_body(
    settings: ModelPlan,
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Body:
    """The frozen body on `device` in `dtype`; raises as `build_head` does.

    What it takes and gives is of `activation_dtype`: in bfloat16 on a CPU it multiplies alone.
    """
    body = Body(settings)
    flowing = activation_dtype(device, dtype)
    body.fill(tensors, device, flowing)
    if flowing != dtype:
        multiply_in_bfloat16(body)
    return body


def build_tunable_body(
    settings: ModelPlan, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> Body:
    """A body on `device` in float32 that shares no memory; what is tuned, trainable.

    Raises as `build_head` does.
    """
    body = build_body(settings, tensors, device)
    _free(body)
    return body


def build_tail(settings: ModelPlan, tensors: Mapping[str, Tensor]) -> Tail:
    """The tail, float32 on the CPU; what is tuned, trainable. Raises as `build_head` does.

    `tensors` holds timm's names, the classifier's among them.
    """
    tail = Tail(settings)
    tail.fill(tensors)
    _free(tail)
    return tail


def _free(part: Part) -> None:
    """Make what is tuned trainable."""
    tensors = part.state_dict(keep_vars=True)
    for own in part.tuned().values():
        tensor = tensors[own]
        tensor.data = tensor.detach().clone()  # training must not write into what was given
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)


def frozen_names(settings: ModelPlan) -> list[str]:
    """timm's names of what a device holds and nobody tunes: of the head, then of the tail."""
    return list(dict.fromkeys([*_untuned(Head(settings)), *_untuned(Tail(settings))]))


def frozen_body_names(settings: ModelPlan) -> list[str]:
    """timm's names of what the body reads and nobody tunes: all of it, but with `tune_body`."""
    return _untuned(Body(settings))


def _untuned(part: Part) -> list[str]:
    tuned = part.tuned()
    return [name for name in part.names() if name not in tuned]
