"""What the model's package raises, as the error that the protocol knows."""

from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import FieldValue, InvalidField
from split_model.architecture import UnsupportedBackboneError
from split_model.packaged import PackagedBackboneError
from split_model.part import WeightsMismatchError
from split_model.settings import SplitSettingsError
from split_model.tensor_file import TensorFileError
from split_model.weights import WeightSourceError


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
