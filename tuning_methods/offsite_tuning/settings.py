"""Settings of offsite-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.method import Fields
from tuning_methods.proxies.settings import DistillationSettings, ProxyPart, check_neurons
from tuning_methods.whole_model import WholeModel, depth_of

if TYPE_CHECKING:
    from protocol.plan import RunPlan
    from protocol.settings import RunSettings


class OffsiteTuning(WholeModel):
    """LoRA on the blocks at both ends of a proxy that has fewer blocks between them.

    An export puts the tuned state into the backbone.

    Source: offsite-tuning (arXiv 2302.04870).
    """

    name: Literal["offsite-tuning"] = "offsite-tuning"
    source: ClassVar[str] = "Offsite-tuning, arXiv 2302.04870"
    server: ClassVar[str] = "tuning_methods.proxies.server:ProxyServer"
    rates: ClassVar[dict[str, Any]] = {"tail_learning_rate": 2e-3}

    ends: int = Field(1, ge=1, le=128, description="blocks at either end that are tuned")
    blocks: int = Field(
        0, ge=0, le=256, description="blocks of the proxy, ends included; 0: half of the backbone's"
    )
    lora_rank: int = Field(
        8, ge=1, le=1024, description="rank of the changes of queries and values"
    )
    distillation: DistillationSettings = Field(
        DistillationSettings(),
        description="distillation of the blocks between the ends; epochs = 0: none",
    )

    def tuning_part(self, settings: RunSettings) -> Fields:
        lora = {"tune": "lora", "lora_rank": self.lora_rank, "lora_ends": self.ends}
        return lora | self._proxy_part()

    def shape_part(self, settings: RunSettings) -> Fields:
        return {"cut": depth_of(settings.model, **self._proxy_part())}

    def own_part(self) -> ProxyPart:
        return ProxyPart(distillation=self.distillation)

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        check_neurons(plan)

    def _proxy_part(self) -> Fields:
        return {"proxy": "dropped", "proxy_ends": self.ends, "proxy_blocks": self.blocks}
