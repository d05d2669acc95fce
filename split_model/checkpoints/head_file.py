"""The file that a device downloads once: its frozen weights and the image preparation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from protocol.codecs import CODECS, Int4
from protocol.plan import ModelPlan
from protocol.wire import FLOAT32_BYTES
from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.backbone.weights import open_backbone
from split_model.checkpoints.metadata import (
    ImagePreparation,
    head_metadata,
    head_plan,
    read_plan,
    read_preparation,
)
from split_model.errors import TensorFileError
from split_model.files import sha256_of
from split_model.parts.build import frozen_names

HeadDtype = Literal["float32", "float16", "int8", "int4"]

_SCALE = ".scale"  # suffix of the name of a quantised tensor's scales

_SHAPE = ".shape"  # suffix of the name of the shape of a matrix in 4 bits

_MIN_QUANTISED = 4096  # scalars; smaller tensors (biases, norms) become float16

_MAX_INT8 = 127

_INT4 = Int4()

EXTRA = "method."  # prefix of a method's further tensors


def packed(tensors: Mapping[str, Tensor], dtype: HeadDtype) -> dict[str, Tensor]:
    """Convert the float32 tensors to ``dtype``; others stay as they are.

    In int8 each output channel, or token of a table, has a scale. A weight's error is at most half
    the scale: 1/254 of the channel's largest weight.

    In int4 the matrices of layers have the codec `int4`: a scale for each group of 64 inputs, and
    an error of at most 1/14 of the group's largest weight. Tables of tokens are as with int8.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match _stored_dtype(name, tensor, dtype):
            case "float32":
                result[name] = tensor
            case "float16":
                result[name] = tensor.to(torch.float16)
            case "int8":
                result |= _to_int8(name, tensor)
            case "int4":
                result |= _to_int4(name, tensor)
    return result


def packed_bytes(tensors: Mapping[str, Tensor], dtype: HeadDtype) -> int:
    """Calculate the bytes of `packed` tensors from their shapes (they may be on the meta device).

    A file adds its header: names, shapes and metadata.
    """
    total = 0
    for name, tensor in tensors.items():
        match _stored_dtype(name, tensor, dtype):
            case "float32":
                total += tensor.nbytes
            case "int4":
                shape = torch.tensor(tensor.shape)
                total += sum(_INT4.sizes(_rows(tensor).shape)) + shape.nbytes
            case "int8":
                total += tensor.numel() + FLOAT32_BYTES * len(_rows(tensor))
            case "float16":
                total += torch.float16.itemsize * tensor.numel()
    return total


class Unpacked(Mapping[str, Tensor]):
    """The original names of `packed` tensors; quantised weights become float32 on access."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        if name + _SHAPE in self._stored:
            return _from_int4(tensor, self._stored[name + _SCALE], self._stored[name + _SHAPE])
        if tensor.dtype != torch.int8:
            return tensor
        scale = self._stored[name + _SCALE].reshape(-1, 1)
        return (_rows(tensor).to(torch.float32) * scale).reshape(tensor.shape)

    def __contains__(self, name: object) -> bool:  # without reading the tensor
        return name in self._stored and not str(name).endswith((_SCALE, _SHAPE))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stored if not name.endswith((_SCALE, _SHAPE)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _stored_dtype(name: str, tensor: Tensor, dtype: HeadDtype) -> HeadDtype:
    """How a file in ``dtype`` holds a tensor; float32 also stands for *as it is*."""
    if tensor.dtype != torch.float32 or dtype == "float32":
        return "float32"
    if dtype == "float16" or tensor.numel() < _MIN_QUANTISED or tensor.ndim < 2:
        return "float16"
    is_matrix = name.endswith(".weight") and tensor.ndim in (2, 4)  # linear layer or convolution
    return "int4" if dtype == "int4" and is_matrix else "int8"


def _rows(tensor: Tensor) -> Tensor:
    """A convolution's kernels by output channel, any other tensor by its last dimension: [R, C]."""
    rows = tensor.shape[0] if tensor.ndim == 4 else math.prod(tensor.shape[:-1])
    return tensor.reshape(rows, -1)


def _to_int8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    rows = _rows(tensor)  # [R, C]
    scale = rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _MAX_INT8
    codes = (rows / scale[:, None]).round().to(torch.int8)
    return {name: codes.reshape(tensor.shape), name + _SCALE: scale}


def _to_int4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Encode the matrix [R, C] as codes [R, ⌈C / 2⌉] and scales [R, ⌈C / 64⌉]."""
    rows = _rows(tensor)
    codes, scales = _INT4.encode(rows)
    return {
        name: CODECS["uint8"].decode([codes], [len(rows), codes.nbytes // len(rows)]),
        name + _SCALE: CODECS["bfloat16"].decode(
            [scales], [len(rows), scales.nbytes // 2 // len(rows)]
        ),
        name + _SHAPE: torch.tensor(tensor.shape),
    }


def _from_int4(codes: Tensor, scales: Tensor, shape: Tensor) -> Tensor:
    """Decode a matrix of `_to_int4`.

    Raises:
        MalformedFrame: the tensors do not fit one another, or a scale is out of range.
    """
    sizes = [int(size) for size in shape]
    rows = [math.prod(sizes[:1]), math.prod(sizes[1:])]
    buffers = [*CODECS["uint8"].encode(codes), *CODECS["bfloat16"].encode(scales)]
    _INT4.check_sizes(rows, [buffer.nbytes for buffer in buffers])
    return _INT4.decode(buffers, rows).reshape(sizes)


def write_head_file(
    settings: ModelPlan,
    backbone_path: Path | str,
    out: Path | str,
    dtype: HeadDtype = "float32",
    extras: Mapping[str, Tensor] | None = None,
) -> tuple[Path, str]:
    """Write the frozen tensors of head and tail. Runs with equal heads get equal files.

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
    write_tensors(path, packed(tensors, dtype), head_metadata(settings))
    return path, sha256_of(path)


def read_head_file(
    path: Path | str,
) -> tuple[ModelPlan, ImagePreparation, Mapping[str, Tensor]]:
    """Read a file of `write_head_file`.

    Returns:
        The plan's fields that determine the file, in a plan with defaults elsewhere (see
        `head_plan`); the image preparation; the tensors by timm's names, each read on access.

    Raises:
        TensorFileError: the file is damaged, or no head file.
    """
    file = TensorFile(Path(path))
    return head_plan(read_plan(file)), read_preparation(file), Unpacked(file)


def head_weights(path: Path | str) -> Mapping[str, Tensor]:
    """Read the tensors of a head file as devices do, by timm's names.

    Raises:
        TensorFileError: the file cannot be read.
    """
    return Unpacked(TensorFile(Path(path)))


def extra_tensors(frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head file's tensors for the device's side of the run's method, without their prefix."""
    return {n.removeprefix(EXTRA): frozen[n] for n in frozen if n.startswith(EXTRA)}
