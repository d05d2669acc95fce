"""Settings of FedPFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.method import Fields
from tuning_methods.proxies.settings import DistillationSettings, ProxyPart, check_neurons
from tuning_methods.proxies.shapes import backbone_widths, check_ends, misfit
from tuning_methods.whole_model import WholeModel

if TYPE_CHECKING:
    from protocol.plan import RunPlan
    from protocol.settings import RunSettings

NARROWING = 4  # 768 of 3072 neurons in ViT-B (FedPFT, arXiv 2404.11536)


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
    stand_in: ClassVar[Fields] = {"cut": 1, "mlp_widths": (1,)}

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
        return {"tune": "lora", "lora_rank": self.lora_rank, "lora_ends": 0}

    def shape_part(self, settings: RunSettings) -> Fields:
        widths = backbone_widths(settings.model)
        return {"cut": len(widths), "mlp_widths": self.narrow(widths)}

    def narrow(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Return `ModelPlan.mlp_widths` of the proxy, from the neurons in each MLP of the backbone.

        Raises:
            InvalidField: a setting does not fit the backbone.
        """
        depth, ends = len(widths), self.ends
        check_ends(ends, depth)
        if self.rebuilds_head and 2 * ends == depth:
            limit = f"below half of the {depth} blocks, so that neurons can be distilled again"
            raise misfit("ends", limit, ends)
        if self.width > min(widths):
            raise misfit("width", f"at most the backbone's {min(widths)} neurons", self.width)
        pruned = (self.width or max(1, width // NARROWING) for width in widths[ends : depth - ends])
        return (*[0] * ends, *pruned, *[0] * ends)

    def own_part(self) -> ProxyPart:
        return ProxyPart(distillation=self.distillation)

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        check_neurons(plan)
