"""Matrix products in bfloat16 and all else in float32: bfloat16 as a CPU is fast in it.

A CPU that has instructions for them multiplies bfloat16 matrices twice as fast as float32 ones, or
more, but is slower in all else that a block does. So the weights of linear layers are kept in
bfloat16 there, and what flows between layers in float32, which also rounds less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def activation_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """What flows between the layers of a body that multiplies in ``dtype`` on ``device``."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu and dtype == torch.bfloat16 else dtype


def mixed_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``inputs`` [..., I] times ``weight`` [O, I], plus ``bias`` [O]: [..., O], of inputs' type.

    Where the types differ, the product is taken in that of the weight, which gets no gradient.
    """
    if inputs.dtype == weight.dtype:
        return F.linear(inputs, weight, bias)
    result: Tensor = _Product.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return result


class BFloat16Linear(nn.Linear):
    """A frozen linear layer that keeps its weights in bfloat16, for float32 inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        biased = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, biased, device="meta")
        self.weight = _frozen(linear.weight)
        if biased:
            self.bias = _frozen(linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return mixed_linear(inputs, self.weight, self.bias)


def multiply_in_bfloat16(part: nn.Module) -> None:
    """Have the linear layers of a frozen part multiply in bfloat16.

    The rest stays as it is, and so does a layer whose weights timm takes for a product of its own:
    queries, keys and values with a bias of their own (Eva, Beit).
    """
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            own_bias = name == "qkv" and getattr(module, "q_bias", None) is not None
            if type(child) is nn.Linear and not own_bias:
                setattr(module, name, BFloat16Linear(child))


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.of = inputs.dtype
        return F.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradients[0].to(weight.dtype) @ weight).to(ctx.of), None, None
