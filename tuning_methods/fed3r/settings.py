"""Settings of Fed3R: one round in which the server solves for the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.base import Message
from protocol.method import Fields
from protocol.plan import RunPlan
from tuning_methods.whole_model import WholeModel

if TYPE_CHECKING:
    from protocol.settings import RunSettings


class Fed3RPart(Message):
    """What Fed3R adds to a run's plan, as `RunPlan.method`."""

    ridge_strength: float | None = Field(
        None, ge=0, le=1e6, description="none: the classifier is trained, not solved for"
    )


class Fed3R(WholeModel):
    """Ridge regression on frozen features, from sums that devices send in a single round."""

    name: Literal["fed3r"] = "fed3r"
    source: ClassVar[str] = "Fed3R, arXiv 2406.01116"
    device: ClassVar[str] = "tuning_methods.fed3r.device:Fed3RDevice"
    server: ClassVar[str] = "tuning_methods.fed3r.server:Fed3RServer"

    epochs: Literal[1] = Field(1, description="always 1: a device reads each sample once")
    strength: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="penalty of the weights, as a share of a sample's mean squared norm; 0: chosen "
        "by generalised cross-validation on the sums",
    )

    def defaults(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"federation": {"rounds": 1}}

    def tuning_part(self, settings: RunSettings) -> Fields:
        return {"tune": "classifier"}

    def own_part(self) -> Fed3RPart:
        return Fed3RPart(ridge_strength=self.strength)

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        federation = plan.federation
        if federation.rounds != 1:
            raise ValueError(
                f"federation.rounds must be 1 with fed3r, not {federation.rounds}: a second round "
                "would repeat the first"
            )
        if federation.server_optimizer != "fedavg":
            raise ValueError(
                "federation.server_optimizer must be fedavg with fed3r, not "
                f"{federation.server_optimizer}: the server solves for the classifier"
            )
        if federation.dp_clip is not None:
            raise ValueError(
                "federation.dp_clip must be none with fed3r: no noise hides what the sums reveal"
            )


def strength_of(plan: RunPlan) -> float:
    """Return the penalty of a plan's method; 0: chosen by generalised cross-validation."""
    return Fed3RPart.model_validate(plan.method).ridge_strength or 0.0
