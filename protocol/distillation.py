"""The part of a run's settings that says how the server makes stand-ins for blocks."""

from __future__ import annotations

from pydantic import Field
from pydantic_core import PydanticCustomError

from protocol.base import Message

__all__ = ["DistillationSettings"]


class DistillationSettings(Message):
    """How the server prepares a smaller stand-in for blocks (FedPFT, arXiv 2404.11536).

    The server has none of the devices' data: it distils on images of its own.
    """

    epochs: int = Field(0, ge=0, le=10_000, description="over these images; 0: no distillation")
    images: str = Field(
        "random",
        pattern=r"^[a-z0-9][a-z0-9-]{0,63}$",
        description="random, normal noise | NAME, of distillation/NAME.safetensors in the "
        "server's folder",
    )
    samples: int = Field(512, ge=1, le=1_000_000, description="of these images, at most")
    batch_size: int = Field(32, ge=1, le=4096)
    learning_rate: float = Field(6e-4, gt=0, le=1, description="of Adam")
    mlp_weight: float = Field(
        0.01, ge=0, le=1000, description="alpha: the share of the MLPs' outputs in the loss"
    )
    every: int = Field(
        0,
        ge=0,
        le=100_000,
        description="rounds after which the neurons that devices use least are distilled again "
        "(proxy = pruned); 0: never",
    )
    retained: float = Field(
        0.5, ge=0, lt=1, description="share of an MLP's neurons, the busiest, that then stay"
    )

    def due(self, round_: int, rounds: int) -> bool:
        """Whether the stand-ins are distilled again after this of so many rounds; not the last."""
        return self.every > 0 and 0 < round_ < rounds and round_ % self.every == 0

    def check_neurons(self, proxy: str, dp_clip: float | None) -> None:
        """Raises pydantic's error where neurons cannot be distilled again in such a run."""
        needs = None
        if proxy != "pruned":
            needs = "model.proxy = pruned: no other stand-in has fewer neurons"
        elif self.epochs == 0:
            needs = "distillation.epochs above 0"
        elif dp_clip is not None:
            needs = "no federation.dp_clip: no noise would hide which neurons a device uses"
        if needs is not None:
            field = "distillation.every"
            raise PydanticCustomError(
                "not_together", "{field} needs {needs}", {"field": field, "needs": needs}
            )
