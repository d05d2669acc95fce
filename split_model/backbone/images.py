"""How images become a backbone's input, and how a file of tensors tells of it."""

import dataclasses
from typing import Any

from split_model.backbone.architecture import skeleton
from split_model.backbone.libraries import timm
from split_model.backbone.tensor_file import TensorFile
from split_model.errors import TensorFileError
from split_model.settings import SplitSettings

PREPARATION = "images"  # the entry of a file's metadata


@dataclasses.dataclass(frozen=True)
class ImagePreparation:
    """How pixels become the head's input: resize, scale to 0 … 1, then (x − mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str  # "bicubic", "bilinear", …


def image_preparation(settings: SplitSettings) -> ImagePreparation:
    """What timm records for the backbone's pretrained weights."""
    config = timm.data.resolve_model_data_config(skeleton(settings))
    return _preparation(config)


def recorded_preparation(file: TensorFile) -> ImagePreparation:
    """What stands in the metadata of a file. Raises `TensorFileError`."""
    try:
        return _preparation(file.json(PREPARATION))
    except (KeyError, TypeError, ValueError) as error:
        raise TensorFileError(file.path, "its image preparation is broken") from error


def _preparation(values: Any) -> ImagePreparation:
    mean, std = ([float(number) for number in values[key]] for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError("mean and std must have three numbers each, std positive ones")
    return ImagePreparation(
        (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), str(values["interpolation"])
    )
