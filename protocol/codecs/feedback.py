"""Error feedback: a codec's error is added to the next tensor of the same name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protocol.codecs.codec import Codec
from protocol.errors import WrongShape

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """Residuals by tensor name, for codecs with large errors.

    It encodes value = tensor + residual and stores residual = value − decoded value. Over many
    steps the sum of the decoded tensors differs from the sum of the tensors only by the last
    residual.

    Args:
        residuals: by tensor name, of an earlier feedback; none of them changes.

    Source: arXiv 1901.09847.
    """

    def __init__(self, residuals: Mapping[str, Tensor] | None = None) -> None:
        self._residuals: dict[str, Tensor] = dict(residuals or {})

    def encode(
        self, name: str, tensor: Tensor, codec: Codec, generator: torch.Generator | None = None
    ) -> list[memoryview]:
        """Encode a tensor plus its residual, and store the new residual.

        Raises:
            WrongShape: an earlier tensor of this name had another shape.
            InvalidField: the codec cannot encode the value; the residual does not change.
        """
        value = self.add_residual(name, tensor)
        buffers = codec.encode(value, generator)
        self.store_residual(name, value, codec.decode(buffers, value.shape, value.device))
        return buffers

    def add_residual(self, name: str, tensor: Tensor) -> Tensor:
        """Return tensor plus residual in float32: the value to encode.

        Raises:
            WrongShape: an earlier tensor of this name had another shape.
        """
        value = tensor.detach().to(torch.float32)
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
        return value + residual.to(value.device)

    def store_residual(self, name: str, value: Tensor, decoded: Tensor) -> None:
        """Store the residual ``value`` − ``decoded``, the codec's error on this tensor."""
        self._residuals[name] = value.detach() - decoded

    def residual(self, name: str) -> Tensor | None:
        """Return the residual of this tensor; None before the first encoding."""
        return self._residuals.get(name)

    def residuals(self) -> dict[str, Tensor]:
        """Return all residuals, by tensor name."""
        return dict(self._residuals)

    def clear(self) -> None:
        """Drop all residuals, after their tensors have been replaced."""
        self._residuals.clear()
