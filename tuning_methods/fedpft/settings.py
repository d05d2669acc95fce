"""Settings of FedPFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.distillation import DistillationSettings
from protocol.method import Fields
from tuning_methods.whole_model import WholeModel, depth_of

if TYPE_CHECKING:
    from protocol.settings import RunSettings


class FedPFT(WholeModel):
    """LoRA on a proxy that has every block of the backbone, with fewer neurons in the MLPs.

    The server distils the proxy before the run, and the neurons that devices use least again every
    few rounds. What was tuned on the proxy is put into the backbone at export.
    """

    name: Literal["fedpft"] = "fedpft"
    source: ClassVar[str] = "FedPFT, arXiv 2404.11536"
    device: ClassVar[str] = "tuning_methods.fedpft.device:FedPFTDevice"
    server: ClassVar[str] = "tuning_methods.fedpft.server:FedPFTServer"
    rates: ClassVar[dict[str, Any]] = {"tail_learning_rate": 2e-3}

    ends: int = Field(1, ge=0, le=128, description="blocks at either end that stay as they are")
    width: int = Field(0, ge=0, le=65_536, description="neurons of the other MLPs; 0: a quarter")
    lora_rank: int = Field(8, ge=1, le=1024, description="of queries' and values' changes")
    distillation: DistillationSettings = Field(
        DistillationSettings(epochs=5, every=10), description="of the proxy, on the server"
    )

    @property
    def renews_head(self) -> bool:
        return self.distillation.every > 0

    def tuned(self, settings: RunSettings) -> Fields:
        tuned = {"tune": "lora", "lora_rank": self.lora_rank, "lora_ends": 0}
        return tuned | {"proxy": "pruned", "proxy_ends": self.ends, "proxy_width": self.width}

    def shaped(self, settings: RunSettings) -> Fields:
        shape = {"proxy": "pruned", "proxy_ends": self.ends, "proxy_width": self.width}
        return {"cut": depth_of(settings.model, **shape)}

    def plan_part(self) -> Fields:
        return {"distillation": self.distillation}
