"""The head's weights as a device downloads them: exact, halved, or in 8 bits with scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

HeadDtype = Literal["float32", "float16", "int8"]

_SCALE = ".scale"  # behind the name of a tensor in 8 bits
_SMALL = 4096  # numbers; what is smaller (biases, norms) stays in half precision
_LARGEST = 127


def packed(tensors: Mapping[str, Tensor], dtype: HeadDtype) -> dict[str, Tensor]:
    """The tensors in this form. Those that are not float32 stay as they are.

    In int8 every output channel, or token of a table, has a scale of its own; a weight is off by
    at most half of it, 1/254 of the largest weight beside it.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or dtype == "float32":
            made[name] = tensor
        elif dtype == "float16" or tensor.numel() < _SMALL or tensor.ndim < 2:
            made[name] = tensor.to(torch.float16)
        else:
            rows = _rows(tensor)  # [R, C]
            scale = rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
            made[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(tensor.shape)
            made[name + _SCALE] = scale
    return made


class Unpacked(Mapping[str, Tensor]):
    """The tensors again, by the names they had; weights in 8 bits become float32."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        if tensor.dtype != torch.int8:
            return tensor
        scale = self._stored[name + _SCALE].reshape(-1, 1)
        return (_rows(tensor).to(torch.float32) * scale).reshape(tensor.shape)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._stored and not str(name).endswith(_SCALE)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stored if not name.endswith(_SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _rows(tensor: Tensor) -> Tensor:
    """A convolution's kernels by output channel, all else by its last dimension: [R, C]."""
    rows = tensor.shape[0] if tensor.ndim == 4 else math.prod(tensor.shape[:-1])
    return tensor.reshape(rows, -1)
