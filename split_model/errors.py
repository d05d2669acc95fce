"""What the model's package raises, as the error that the protocol knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import FieldValue, InvalidField


class SplitSettingsError(ValueError):
    """A setting is outside its limit.

    Attributes: `field` (its name), `limit` (what is allowed, in words), `value` (what was given).
    """

    def __init__(self, field: str, limit: str, value: object) -> None:
        super().__init__(f"{field} must be {limit}, not {value!r}")
        self.field = field
        self.limit = limit
        self.value = value


_SUPPORTED = (
    "timm architectures of the classes VisionTransformer (also distilled and hybrid), Eva and "
    "Beit: see split_model.supported_backbones()"
)


class UnsupportedBackboneError(ValueError):
    """timm does not know the backbone, or it is no plain vision transformer that can be cut.

    Attributes: `backbone` (its name), `supported` (what can be cut, in words).
    """

    def __init__(self, backbone: str, reason: str) -> None:
        super().__init__(f"cannot cut {backbone!r}: {reason}; supported are {_SUPPORTED}")
        self.backbone = backbone
        self.supported = _SUPPORTED


class WeightsMismatchError(ValueError):
    """The tensors given do not fit the part: one is missing, or has another shape.

    Attributes: `field` (the tensor's name), `limit` (the expected shape), `value` (the given one).
    """

    def __init__(self, field: str, limit: object, value: object) -> None:
        super().__init__(f"tensor {field} must be {limit}, not {value}")
        self.field = field
        self.limit = limit
        self.value = value


class TokenCountError(ValueError):
    """A token tensor has another shape than the settings allow.

    Attributes: `field`, `limit` (what is allowed, in words), `value` (the shape given).
    """

    def __init__(self, field: str, limit: str, value: tuple[int, ...]) -> None:
        super().__init__(f"{field} must be {limit}, not of shape {list(value)}")
        self.field = field
        self.limit = limit
        self.value = value


class TensorFileError(ValueError):
    """A tensor file is missing, broken, or not what it should be.

    Attribute: `path`.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class PackagedBackboneError(RuntimeError):
    """The packaged backbone cannot be fetched or read; the message says what to do."""


class WeightSourceError(ValueError):
    """The weights cannot be had from the source.

    Attributes: `field` ("source"), `limit` (what is allowed, in words), `value` (the source).
    """

    def __init__(self, limit: str, value: str) -> None:
        super().__init__(f"source must be {limit}, not {value!r}")
        self.field = "source"
        self.limit = limit
        self.value = value


@contextmanager
def model_errors() -> Iterator[None]:
    """Turn what the model's package raises into the contract's error.

    Raises:
        InvalidField: naming the field of the run's settings.
    """
    try:
        yield
    except SplitSettingsError as error:
        field = "model." + error.field.replace("model_overrides", "image_size")
        raise InvalidField(
            str(error), field=field, limit=error.limit, value=_plain(error.value)
        ) from error
    except UnsupportedBackboneError as error:
        raise InvalidField(str(error), field="model.backbone", value=error.backbone) from error
    except WeightSourceError as error:
        raise InvalidField(
            str(error), field="model.weights", limit=error.limit, value=error.value
        ) from error
    except (
        PackagedBackboneError,
        TensorFileError,
        WeightsMismatchError,
    ) as error:
        raise InvalidField(str(error), field="model.weights") from error


def _plain(value: object) -> FieldValue:
    return value if isinstance(value, (str, int, float)) else str(value)
