"""The file a device downloads once: what it holds frozen, and how images are prepared for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.metadata import (
    ImagePreparation,
    model_metadata,
    read_plan,
    read_preparation,
)
from split_model.errors import TensorFileError
from split_model.files import sha256_of
from split_model.parts.build import frozen_names

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


EXTRA = "local_body."  # prefix of a method's further tensors


def write_head_file(
    settings: ModelPlan,
    backbone_path: Path | str,
    out: Path | str,
    dtype: HeadDtype = "float32",
    extras: Mapping[str, Tensor] | None = None,
) -> tuple[Path, str]:
    """Write what a device holds frozen of a prepared backbone; returns its path and SHA-256.

    That is the head, less what is tuned of it, and what is not tuned of the tail. `dtype` is that
    of the weights in the file; a head always computes in float32. `extras` are further tensors for
    the device's side of the run's method; they get a prefix.

    Raises `TensorFileError` or `WeightsMismatchError`.
    """
    backbone = open_backbone(backbone_path)
    names = frozen_names(settings)
    missing = [name for name in names if name not in backbone]
    if missing:
        raise TensorFileError(Path(backbone_path), f"lacks the tensors {missing}")
    path = Path(out)
    tensors = {name: backbone[name] for name in names}
    tensors |= {EXTRA + name: tensor for name, tensor in (extras or {}).items()}
    write_tensors(path, packed(tensors, dtype), model_metadata(settings))
    return path, sha256_of(path)


def read_head_file(
    path: Path | str,
) -> tuple[ModelPlan, ImagePreparation, Mapping[str, Tensor]]:
    """The settings, the image preparation and the tensors that `write_head_file` wrote.

    The tensors bear timm's names and are as devices have them; each is read when asked for.
    Raises `TensorFileError` or `ModelPlanError`.
    """
    file = TensorFile(Path(path))
    return read_plan(file), read_preparation(file), Unpacked(file)


def head_weights(path: Path | str) -> Mapping[str, Tensor]:
    """The file's tensors as devices have them, by timm's names. Raises `TensorFileError`."""
    return Unpacked(TensorFile(Path(path)))


def extra_tensors(frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head file's tensors for the device's side of the run's method, without their prefix."""
    return {n.removeprefix(EXTRA): frozen[n] for n in frozen if n.startswith(EXTRA)}
