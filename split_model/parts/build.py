"""Build one part of the model without allocating the others."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from protocol.plan import ModelPlan
from split_model.layers.bfloat16 import activation_dtype, multiply_in_bfloat16
from split_model.parts.base import Part
from split_model.parts.body import Body
from split_model.parts.depths import make_tail
from split_model.parts.head import Head
from split_model.parts.tail import Tail


class Layered(Mapping[str, Tensor]):
    """Several mappings as one: a name is looked up in the first mapping that has it."""

    def __init__(self, *layers: Mapping[str, Tensor]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> Tensor:
        for layer in self._layers:
            if name in layer:
                return layer[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:  # without reading the tensor
        return any(name in layer for layer in self._layers)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for layer in self._layers for name in layer))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def build_head(settings: ModelPlan, tensors: Mapping[str, Tensor]) -> Head:
    """Build the head, float32 on the CPU, with its tuned parameters trainable.

    Args:
        settings: the model's plan.
        tensors: by timm's names; only the head's tensors are read.

    Raises:
        UnsupportedBackboneError: the backbone cannot be cut.
        ModelPlanError: the plan does not fit the backbone.
        WeightsMismatchError: a tensor is missing or has another shape.
    """
    head = Head(settings)
    head.fill(tensors)
    _make_trainable(head)
    return head


def build_body(
    settings: ModelPlan,
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Body:
    """Build the frozen body on `device` in `dtype`; raises as `build_head` does.

    Its inputs and outputs are of `activation_dtype`: on a CPU, bfloat16 is for matrices alone.
    """
    body = Body(settings)
    activations = activation_dtype(device, dtype)
    body.fill(tensors, device, activations)
    if activations != dtype:
        multiply_in_bfloat16(body)
    return body


def build_tunable_body(
    settings: ModelPlan, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> Body:
    """Build a trainable body on `device` in float32 that shares no memory with ``tensors``.

    Raises as `build_head` does.
    """
    body = build_body(settings, tensors, device)
    _make_trainable(body)
    return body


def build_tail(settings: ModelPlan, tensors: Mapping[str, Tensor]) -> Tail:
    """Build the tail, float32 on the CPU, with its tuned parameters trainable.

    ``tensors``, by timm's names, include the classifier's. Raises as `build_head` does.
    """
    tail = make_tail(settings)
    tail.fill(tensors)
    _make_trainable(tail)
    return tail


def _make_trainable(part: Part) -> None:
    tensors = part.state_dict(keep_vars=True)
    for key in part.tuned().values():
        tensor = tensors[key]
        tensor.data = tensor.detach().clone()  # training must not change the caller's tensors
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)


def frozen_names(settings: ModelPlan) -> list[str]:
    """timm's names of the device's frozen tensors: the head's, then the tail's."""
    return list(dict.fromkeys([*_untuned(Head(settings)), *_untuned(make_tail(settings))]))


def frozen_body_names(settings: ModelPlan) -> list[str]:
    """timm's names of the body's frozen tensors; with `tune_body` no parameters."""
    return _untuned(Body(settings))


def _untuned(part: Part) -> list[str]:
    tuned = part.tuned()
    return [name for name in part.names() if name not in tuned]
