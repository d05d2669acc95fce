"""Error feedback: what a codec left out is added to the next tensor of the same name."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.codecs.codec import Codec
from protocol.errors import WrongShape

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """Residuals by the names of tensors, for codecs that leave much out (arXiv 1901.09847).

    What is sent is value = tensor + residual; what is kept is residual = value − what the other
    end decodes. Over many steps the sum of what was decoded differs from the sum of the tensors by
    the last residual alone. It knows nothing of the codec.
    """

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}

    def encode(
        self, name: str, tensor: Tensor, codec: Codec, generator: torch.Generator | None = None
    ) -> list[memoryview]:
        """The buffers of ``tensor`` and of what earlier ones of this name still lack.

        Raises:
            WrongShape: an earlier tensor of this name had another shape.
            InvalidField: the tensor cannot be sent with this codec; the residual stays as it was.
        """
        value = self.correct(name, tensor)
        buffers = codec.encode(value, generator)
        self.keep(name, value, codec.decode(buffers, value.shape, value.device))
        return buffers

    def correct(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` and the residual together, in float32: what is to be sent.

        Raises:
            WrongShape: an earlier tensor of this name had another shape.
        """
        value = tensor.detach().to(torch.float32)
        residual = self._residuals.get(name)
        if residual is None:
            return value
        if residual.shape != value.shape:
            raise WrongShape(
                "the residual of this tensor has another shape",
                field=name,
                limit=list(residual.shape),
                value=list(value.shape),
            )
        return value + residual.to(value.device)

    def keep(self, name: str, value: Tensor, decoded: Tensor) -> None:
        """Remember what of ``value`` the other end did not get, ``decoded`` being what it got."""
        self._residuals[name] = value.detach() - decoded

    def residual(self, name: str) -> Tensor | None:
        """What is still to be sent of this tensor; None before the first."""
        return self._residuals.get(name)

    def forget(self) -> None:
        """Drop all residuals: what they belonged to has been replaced from elsewhere."""
        self._residuals.clear()
