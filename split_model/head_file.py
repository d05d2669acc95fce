"""The file a device downloads once: what it holds frozen, and how images are prepared for it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from split_model.head_weights import HeadDtype, Unpacked, packed
from split_model.image_preparation import (
    PREPARATION,
    ImagePreparation,
    image_preparation,
    recorded_preparation,
)
from split_model.parts import frozen_names
from split_model.settings import SplitSettings, SplitSettingsError
from split_model.tensor_file import TensorFile, TensorFileError, sha256_of, write_tensors
from split_model.weights import open_backbone

LOCAL_BODY = "local_body."  # before timm's names


def write_head_file(
    settings: SplitSettings,
    backbone_path: Path | str,
    out: Path | str,
    dtype: HeadDtype = "float32",
    local_body: Mapping[str, Tensor] | None = None,
) -> tuple[Path, str]:
    """Write what a device holds frozen of a prepared backbone; returns its path and SHA-256.

    That is the head, less what is tuned of it, and what is not tuned of the tail. `dtype` is that
    of the weights in the file; a head always computes in float32. `local_body` are the tensors of a
    small body for the local update, which stand there by names of their own.

    Raises `TensorFileError` or `WeightsMismatchError`.
    """
    backbone = open_backbone(backbone_path)
    names = frozen_names(settings)
    missing = [name for name in names if name not in backbone]
    if missing:
        raise TensorFileError(Path(backbone_path), f"lacks the tensors {missing}")
    metadata = {
        "settings": json.dumps(settings.to_dict()),
        PREPARATION: json.dumps(dataclasses.asdict(image_preparation(settings))),
    }
    path = Path(out)
    tensors = {name: backbone[name] for name in names}
    tensors |= {LOCAL_BODY + name: tensor for name, tensor in (local_body or {}).items()}
    write_tensors(path, packed(tensors, dtype), metadata)
    return path, sha256_of(path)


def read_head_file(
    path: Path | str,
) -> tuple[SplitSettings, ImagePreparation, Mapping[str, Tensor]]:
    """The settings, the image preparation and the tensors that `write_head_file` wrote.

    The tensors bear timm's names and are as devices have them; each is read when asked for.
    Raises `TensorFileError` or `SplitSettingsError`.
    """
    file = TensorFile(Path(path))
    values = file.json("settings")
    if not isinstance(values, dict):
        raise SplitSettingsError("settings", "a mapping", values)
    settings = SplitSettings.from_dict(values)
    return settings, recorded_preparation(file), Unpacked(file)


def head_weights(path: Path | str) -> Mapping[str, Tensor]:
    """The file's tensors as devices have them, by timm's names. Raises `TensorFileError`."""
    return Unpacked(TensorFile(Path(path)))


def local_body_tensors(frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a head file's tensors those of the local update's small body, by timm's names."""
    return {n.removeprefix(LOCAL_BODY): frozen[n] for n in frozen if n.startswith(LOCAL_BODY)}
