"""The metadata of a tensor file: the model's plan, and how images become its input."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from protocol.architecture import Architecture
from protocol.plan import ModelPlan
from split_model.errors import TensorFileError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Protocol

    class MetadataFile(Protocol):
        """A file of tensors with metadata, whichever library reads its tensors."""

        path: Path
        metadata: dict[str, str]

        def json(self, key: str) -> Any: ...


# Entries of the metadata.
_PLAN, _IMAGES, _ARCHITECTURE = "settings", "images", "architecture"

# Fields of earlier releases that a plan no longer has.
_FORMER = ("local_body", "proxy", "proxy_ends", "proxy_width", "proxy_blocks")


@dataclasses.dataclass(frozen=True)
class ImagePreparation:
    """How pixels become the head's input: resize, scale to 0 … 1, then (x − mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str  # "bicubic", "bilinear", …


def image_preparation(settings: ModelPlan) -> ImagePreparation:
    """The preparation that timm records for the backbone's pretrained weights."""
    # Imported here: a device reads metadata without timm.
    from split_model.backbone.architecture import skeleton
    from split_model.backbone.libraries import timm

    config = timm.data.resolve_model_data_config(skeleton(settings))
    return _parse_preparation(config)


def model_metadata(settings: ModelPlan) -> dict[str, str]:
    """The entries that `read_plan` and `read_preparation` read.

    The source of the weights is left out: it may be a path on the server.
    """
    plan = settings.model_dump(mode="json", exclude={"weights"})
    plan["model_overrides"] = settings.model_overrides
    return _entries(settings, plan)


def head_plan(settings: ModelPlan) -> ModelPlan:
    """The plan's fields that determine a head file; all others have their defaults."""
    return ModelPlan(
        backbone=settings.backbone,
        image_size=settings.image_size,
        cut=settings.cut,
        model_overrides=settings.model_overrides,
    )


def head_metadata(settings: ModelPlan) -> dict[str, str]:
    """The entries of a head file, without those that differ between runs with the same head.

    Equal heads are then equal files, and a device downloads them once.
    """
    plan = head_plan(settings).model_dump(mode="json", exclude_unset=True)
    if settings.model_overrides:
        plan["model_overrides"] = settings.model_overrides
    return _entries(settings, plan)


def _entries(settings: ModelPlan, plan: dict[str, Any]) -> dict[str, str]:
    preparation = dataclasses.asdict(image_preparation(settings))
    entries = {_PLAN: json.dumps(plan), _IMAGES: json.dumps(preparation)}
    # Imported here, as timm is above.
    from split_model.checkpoints.architecture import describe

    architecture = None if settings.is_reshaped else describe(settings)
    if architecture is not None:
        entries[_ARCHITECTURE] = architecture.model_dump_json(exclude_defaults=True)
    return entries


def read_plan(file: MetadataFile) -> ModelPlan:
    """The plan in a file's metadata, with the default source of the weights.

    Raises:
        TensorFileError: there is none, or it breaks a limit.
    """
    values = file.json(_PLAN)
    if isinstance(values, dict):
        values = {field: value for field, value in values.items() if field not in _FORMER}
    try:
        return ModelPlan.model_validate(_with_tuples(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"its settings are invalid: {place}: {first['msg']}"
        raise TensorFileError(file.path, reason) from error


def _with_tuples(value: object) -> object:
    """Replace JSON's lists at any depth by tuples, which plans have."""
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return value


def read_preparation(file: MetadataFile) -> ImagePreparation:
    """The image preparation in a file's metadata.

    Raises:
        TensorFileError: there is none, or it is invalid.
    """
    try:
        return _parse_preparation(file.json(_IMAGES))
    except (KeyError, TypeError, ValueError) as error:
        raise TensorFileError(file.path, "its image preparation is invalid") from error


def read_architecture(file: MetadataFile) -> Architecture | None:
    """The architecture in a file's metadata; None: a device needs timm to compute the head.

    Raises:
        TensorFileError: it is invalid.
    """
    if _ARCHITECTURE not in file.metadata:
        return None
    try:
        return Architecture.model_validate(file.json(_ARCHITECTURE))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"its architecture is invalid: {place}: {first['msg']}"
        raise TensorFileError(file.path, reason) from error


def _parse_preparation(values: Any) -> ImagePreparation:
    mean, std = ([float(number) for number in values[key]] for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError("mean and std must have three numbers each, std positive ones")
    return ImagePreparation(
        (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), str(values["interpolation"])
    )
