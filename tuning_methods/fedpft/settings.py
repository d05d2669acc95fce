"""Settings of FedPFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.method import Fields
from tuning_methods.proxies.settings import DistillationSettings, ProxyPart, check_neurons
from tuning_methods.whole_model import WholeModel, depth_of

if TYPE_CHECKING:
    from protocol.plan import RunPlan
    from protocol.settings import RunSettings


class FedPFT(WholeModel):
    """LoRA on a proxy that has all blocks of the backbone, with fewer neurons in the MLPs.

    The server distils the proxy before the run, and its least used neurons again every few rounds.
    An export puts the tuned state into the backbone.

    Source: FedPFT (arXiv 2404.11536).
    """

    name: Literal["fedpft"] = "fedpft"
    source: ClassVar[str] = "FedPFT, arXiv 2404.11536"
    device: ClassVar[str] = "tuning_methods.fedpft.device:FedPFTDevice"
    server: ClassVar[str] = "tuning_methods.fedpft.server:FedPFTServer"
    rates: ClassVar[dict[str, Any]] = {"tail_learning_rate": 2e-3}

    ends: int = Field(1, ge=0, le=128, description="blocks at either end whose MLPs are not pruned")
    width: int = Field(
        0, ge=0, le=65_536, description="neurons of each pruned MLP; 0: a quarter of the backbone's"
    )
    lora_rank: int = Field(
        8, ge=1, le=1024, description="rank of the changes of queries and values"
    )
    distillation: DistillationSettings = Field(
        DistillationSettings(epochs=5, every=10),
        description="distillation of the proxy, on the server",
    )

    @property
    def rebuilds_head(self) -> bool:
        return self.distillation.every > 0

    def tuning_part(self, settings: RunSettings) -> Fields:
        lora = {"tune": "lora", "lora_rank": self.lora_rank, "lora_ends": 0}
        return lora | self._proxy_part()

    def shape_part(self, settings: RunSettings) -> Fields:
        return {"cut": depth_of(settings.model, **self._proxy_part())}

    def own_part(self) -> ProxyPart:
        return ProxyPart(distillation=self.distillation)

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        check_neurons(plan)

    def _proxy_part(self) -> Fields:
        return {"proxy": "pruned", "proxy_ends": self.ends, "proxy_width": self.width}
