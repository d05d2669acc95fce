"""The file that a device downloads once: its frozen weights and the image preparation."""

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

_SCALE = ".scale"  # suffix of the name of an int8 tensor's scales

_MIN_QUANTISED = 4096  # scalars; smaller tensors (biases, norms) become float16

_MAX_INT8 = 127

EXTRA = "local_body."  # prefix of a method's further tensors


def packed(tensors: Mapping[str, Tensor], dtype: HeadDtype) -> dict[str, Tensor]:
    """Convert the float32 tensors to ``dtype``; others stay as they are.

    In int8 each output channel, or token of a table, has a scale. A weight's error is at most half
    the scale: 1/254 of the channel's largest weight.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or dtype == "float32":
            result[name] = tensor
        elif dtype == "float16" or tensor.numel() < _MIN_QUANTISED or tensor.ndim < 2:
            result[name] = tensor.to(torch.float16)
        else:
            rows = _rows(tensor)  # [R, C]
            scale = rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _MAX_INT8
            result[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(tensor.shape)
            result[name + _SCALE] = scale
    return result


class Unpacked(Mapping[str, Tensor]):
    """The original names of `packed` tensors; int8 weights become float32 on access."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        if tensor.dtype != torch.int8:
            return tensor
        scale = self._stored[name + _SCALE].reshape(-1, 1)
        return (_rows(tensor).to(torch.float32) * scale).reshape(tensor.shape)

    def __contains__(self, name: object) -> bool:  # without reading the tensor
        return name in self._stored and not str(name).endswith(_SCALE)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stored if not name.endswith(_SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _rows(tensor: Tensor) -> Tensor:
    """A convolution's kernels by output channel, any other tensor by its last dimension: [R, C]."""
    rows = tensor.shape[0] if tensor.ndim == 4 else math.prod(tensor.shape[:-1])
    return tensor.reshape(rows, -1)


def write_head_file(
    settings: ModelPlan,
    backbone_path: Path | str,
    out: Path | str,
    dtype: HeadDtype = "float32",
    extras: Mapping[str, Tensor] | None = None,
) -> tuple[Path, str]:
    """Write the frozen tensors of head and tail.

    Args:
        settings: the model's plan.
        backbone_path: of the prepared backbone.
        out: the file to write.
        dtype: of the weights in the file; a head always computes in float32.
        extras: further tensors for the device's side of the run's method, by name.

    Returns:
        The path of the file and its SHA-256.

    Raises:
        TensorFileError: the backbone cannot be read, or lacks a tensor.
    """
    backbone = open_backbone(backbone_path)
    names = frozen_names(settings)
    missing = [name for name in names if name not in backbone]
    if missing:
        raise TensorFileError(Path(backbone_path), f"it lacks the tensors {missing}")
    path = Path(out)
    tensors = {name: backbone[name] for name in names}
    tensors |= {EXTRA + name: tensor for name, tensor in (extras or {}).items()}
    write_tensors(path, packed(tensors, dtype), model_metadata(settings))
    return path, sha256_of(path)


def read_head_file(
    path: Path | str,
) -> tuple[ModelPlan, ImagePreparation, Mapping[str, Tensor]]:
    """Read a file of `write_head_file`.

    Returns:
        The plan, the image preparation, and the tensors by timm's names, each read on access.

    Raises:
        TensorFileError: the file is damaged, or no head file.
    """
    file = TensorFile(Path(path))
    return read_plan(file), read_preparation(file), Unpacked(file)


def head_weights(path: Path | str) -> Mapping[str, Tensor]:
    """Read the tensors of a head file as devices do, by timm's names.

    Raises:
        TensorFileError: the file cannot be read.
    """
    return Unpacked(TensorFile(Path(path)))


def extra_tensors(frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head file's tensors for the device's side of the run's method, without their prefix."""
    return {n.removeprefix(EXTRA): frozen[n] for n in frozen if n.startswith(EXTRA)}
