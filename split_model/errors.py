"""What can go wrong between a model's plan and its modules.

InvalidField
├── ModelPlanError            a field of the plan does not fit the backbone
├── UnsupportedBackboneError  timm does not know the backbone, or it cannot be cut
├── WeightSourceError         the source does not give the weights
├── PackagedBackboneError     the packaged backbone cannot be fetched or read
├── TensorFileError           a tensor file is missing, damaged or of another kind
└── WeightsMismatchError      a tensor is missing or has another shape
WrongShape
└── TokenCountError           a tensor of tokens has another shape than the plan allows
"""

from __future__ import annotations

from pathlib import Path

from protocol.errors import FieldValue, InvalidField, WrongShape


class ModelPlanError(InvalidField):
    """A field of the model's plan does not fit the backbone."""

    def __init__(self, field: str, limit: str, value: object) -> None:
        super().__init__(
            "the model's plan does not fit the backbone",
            field=f"model.{field}",
            limit=limit,
            value=_plain(value),
        )


class UnsupportedBackboneError(InvalidField):
    """timm does not know the backbone, or it is no plain vision transformer that can be cut."""

    def __init__(self, backbone: str, reason: str) -> None:
        super().__init__(
            f"this backbone cannot be cut: {reason}",
            field="model.backbone",
            limit="timm's VisionTransformer (also distilled and hybrid), Eva or Beit",
            value=backbone,
            hint="split_model.backbone.architecture.supported_backbones() lists the names",
        )


class WeightSourceError(InvalidField):
    """The source does not give the weights."""

    def __init__(self, limit: str, value: str) -> None:
        super().__init__(
            "the source does not give the weights",
            field="model.weights",
            limit=limit,
            value=value,
        )


class PackagedBackboneError(InvalidField):
    """The packaged backbone cannot be fetched or read."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason, field="model.weights", value="packaged", hint=hint)


class TensorFileError(InvalidField):
    """A tensor file is missing, damaged or of another kind."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}",
            field="model.weights",
            hint="delete the file, then download or write it again",
        )


class WeightsMismatchError(InvalidField):
    """The tensors do not fit the part: one is unknown or missing, or has another shape."""

    def __init__(self, field: str, limit: str, value: object) -> None:
        super().__init__(
            "the tensors do not fit this part of the model",
            field=field,
            limit=limit,
            value=_plain(value),
        )


class TokenCountError(WrongShape):
    """A tensor of images, prompts or tokens has another shape than the plan allows."""

    def __init__(self, field: str, limit: str, value: tuple[int, ...]) -> None:
        super().__init__(
            "the plan does not allow this shape", field=field, limit=limit, value=list(value)
        )


def _plain(value: object) -> FieldValue:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, str | int | float | list | None) else str(value)
