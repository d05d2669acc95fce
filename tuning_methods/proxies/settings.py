"""Settings of the distillation of proxies and local bodies on the server."""

from __future__ import annotations

from pydantic import Field
from pydantic_core import PydanticCustomError

from protocol.base import Message
from protocol.messages import parse_message
from protocol.plan import RunPlan

__all__ = ["DistillationSettings", "ProxyPart", "check_neurons", "distillation_of"]


class DistillationSettings(Message):
    """How the server distils smaller replacements for blocks (FedPFT, arXiv 2404.11536).

    The server does not have the devices' data: it distils on noise or on images in its folder.
    """

    epochs: int = Field(
        0, ge=0, le=10_000, description="epochs over the images; 0: no distillation"
    )
    images: str = Field(
        "random",
        pattern=r"^[a-z0-9][a-z0-9-]{0,63}$",
        description="random: normal noise | NAME: distillation/NAME.safetensors in the server's "
        "data folder",
    )
    samples: int = Field(512, ge=1, le=1_000_000, description="maximum number of images")
    batch_size: int = Field(32, ge=1, le=4096, description="images a batch")
    learning_rate: float = Field(6e-4, gt=0, le=1, description="learning rate of Adam")
    mlp_weight: float = Field(
        0.01, ge=0, le=1000, description="alpha: weight of the MLPs' outputs in the loss"
    )
    every: int = Field(
        0,
        ge=0,
        le=100_000,
        description="rounds between distillations of the least used neurons of narrower MLPs; "
        "0: never",
    )
    retained: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of an MLP's neurons, the busiest, that are not distilled again",
    )

    def is_due(self, round_: int, rounds: int) -> bool:
        """Whether neurons are distilled again after this round, of ``rounds``; not after the last.

        Args:
            round_: number of the round, from 1.
            rounds: number of rounds in the run.
        """
        return self.every > 0 and 0 < round_ < rounds and round_ % self.every == 0


class ProxyPart(Message):
    """What a method with a proxy adds to a run's plan, as `RunPlan.method`."""

    distillation: DistillationSettings = DistillationSettings()


def distillation_of(plan: RunPlan) -> DistillationSettings:
    """Return the distillation of a run; a method that distils nothing has the defaults.

    Raises:
        InvalidField: a field is wrong.
    """
    return parse_message(DistillationSettings, plan.method.get("distillation", {}))


def check_neurons(plan: RunPlan) -> None:
    """Check that the neurons of the run's proxy can be distilled again, if they are to be.

    Raises:
        PydanticCustomError: `method.distillation.every` needs another setting.
    """
    distillation, needs = distillation_of(plan), None
    if not distillation.every:
        return
    if not any(plan.model.mlp_widths):
        needs = "a proxy with narrower MLPs: no other replacement has fewer neurons"
    elif distillation.epochs == 0:
        needs = "method.distillation.epochs above 0"
    elif plan.federation.dp_clip is not None:
        needs = "no federation.dp_clip: no noise would hide which neurons a device uses"
    if needs is not None:
        field = "method.distillation.every"
        raise PydanticCustomError(
            "not_together", "{field} needs {needs}", {"field": field, "needs": needs}
        )
