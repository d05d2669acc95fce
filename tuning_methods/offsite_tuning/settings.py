"""Settings of offsite-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.method import Fields
from tuning_methods.proxies.settings import DistillationSettings, ProxyPart, check_neurons
from tuning_methods.proxies.shapes import backbone_widths, check_ends, evenly, misfit
from tuning_methods.whole_model import WholeModel

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
        return {"tune": "lora", "lora_rank": self.lora_rank, "lora_ends": self.ends}

    def shape_part(self, settings: RunSettings) -> Fields:
        blocks = self.keep(len(backbone_widths(settings.model)))
        return {"cut": len(blocks), "blocks": blocks}

    def keep(self, depth: int) -> tuple[int, ...]:
        """Return `ModelPlan.blocks` of the proxy of a backbone of ``depth`` blocks.

        They are those at both ends, and evenly spaced ones between.

        Raises:
            InvalidField: a setting does not fit the backbone.

        Source: the emulator of offsite-tuning (arXiv 2302.04870, section 3).
        """
        ends = self.ends
        check_ends(ends, depth)
        count = self.blocks or max(2 * ends, depth // 2)
        if not 2 * ends <= count <= depth:
            limit = f"from {2 * ends} (two ends of {ends}) to the backbone's {depth} blocks"
            raise misfit("blocks", limit, count)
        middle = evenly(range(ends, depth - ends), count - 2 * ends)
        return (*range(ends), *middle, *range(depth - ends, depth))

    def own_part(self) -> ProxyPart:
        return ProxyPart(distillation=self.distillation)

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        check_neurons(plan)
