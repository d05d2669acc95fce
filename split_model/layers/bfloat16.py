"""Bfloat16 on a CPU: matrix products in bfloat16, everything else in float32.

A CPU with bfloat16 instructions multiplies bfloat16 matrices at least twice as fast as float32
ones, but is slower in a block's other operations. Therefore linear layers store bfloat16 weights,
and activations stay in float32, which also loses less precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def activation_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a body's activations where its matrices are in ``dtype`` on ``device``."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu and dtype == torch.bfloat16 else dtype


def mixed_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight may have another dtype than its inputs.

    The product is computed in the weight's dtype; a weight of another dtype gets no gradient.

    Args:
        inputs: [..., I].
        weight: [O, I].
        bias: [O].

    Returns:
        [..., O] in the inputs' dtype.
    """
    if inputs.dtype == weight.dtype:
        return F.linear(inputs, weight, bias)
    result: Tensor = _MixedLinear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return result


class BFloat16Linear(nn.Linear):
    """A frozen linear layer with bfloat16 weights for float32 inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight = _frozen(linear.weight)
        if has_bias:
            self.bias = _frozen(linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return mixed_linear(inputs, self.weight, self.bias)


def multiply_in_bfloat16(part: nn.Module) -> None:
    """Replace the linear layers of a frozen part by `BFloat16Linear`, in place.

    A joint projection with separate query and value biases (Eva, Beit) stays in float32, because
    timm reads its weight directly.
    """
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            separate_bias = name == "qkv" and getattr(module, "q_bias", None) is not None
            if type(child) is nn.Linear and not separate_bias:
                setattr(module, name, BFloat16Linear(child))


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = inputs.dtype
        return F.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradients[0].to(weight.dtype) @ weight).to(ctx.dtype), None, None
