"""Error feedback: a codec's error is added to the next tensor of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic

from protocol.arrays import SomeArray, backend_of
from protocol.codecs.codec import Codec
from protocol.errors import WrongShape

if TYPE_CHECKING:
    from protocol.arrays import Generator

__all__ = ["ErrorFeedback"]


class ErrorFeedback(Generic[SomeArray]):
    """Residuals by name, of NumPy arrays or of torch tensors, for codecs with large errors.

    It encodes value = array + residual and stores residual = value − decoded value. Over many
    steps the sum of the decoded arrays differs from the sum of the arrays only by the last
    residual.

    Args:
        residuals: by name, of an earlier feedback; none of them changes.

    Source: arXiv 1901.09847.
    """

    def __init__(self, residuals: Mapping[str, SomeArray] | None = None) -> None:
        self._residuals: dict[str, Any] = dict(residuals or {})

    def encode(
        self, name: str, array: SomeArray, codec: Codec, generator: Generator | None = None
    ) -> list[memoryview]:
        """Encode an array plus its residual, and store the new residual.

        Raises:
            WrongShape: an earlier array of this name had another shape.
            InvalidField: the codec cannot encode the value; the residual does not change.
        """
        value: Any = self.add_residual(name, array)
        buffers = codec.encode(value, generator)
        self.store_residual(name, value, codec.decode_like(value, buffers))
        return buffers

    def add_residual(self, name: str, array: SomeArray) -> SomeArray:
        """Return array plus residual in float32: the value to encode.

        Raises:
            WrongShape: an earlier array of this name had another shape.
        """
        backend = backend_of(array)
        value: SomeArray = backend.xp.astype(backend.own(array), backend.xp.float32, copy=False)
        residual = self._residuals.get(name)
        if residual is None:
            return value
        if residual.shape != value.shape:
            raise WrongShape(
                "the tensor and its residual must have the same shape",
                field=name,
                limit=list(residual.shape),
                value=list(value.shape),
            )
        total: SomeArray = value + backend.own(residual)
        return total

    def store_residual(self, name: str, value: SomeArray, decoded: SomeArray) -> None:
        """Store the residual ``value`` − ``decoded``, the codec's error on this array."""
        backend = backend_of(value)
        self._residuals[name] = backend.own(value) - backend.own(decoded)

    def residual(self, name: str) -> SomeArray | None:
        """Return the residual of this array; None before the first encoding."""
        return self._residuals.get(name)

    def residuals(self) -> dict[str, SomeArray]:
        """Return all residuals, by name."""
        return dict(self._residuals)

    def clear(self) -> None:
        """Drop all residuals, after their arrays have been replaced."""
        self._residuals.clear()
