"""Settings of FedPEFT: what of the whole model on the device is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.method import Fields
from tuning_methods.whole_model import WholeModel, anatomy_of

if TYPE_CHECKING:
    from protocol.settings import RunSettings

NARROWING = 8  # an adapter's width, of the backbone's: 96 of 768 in ViT-B

_RATES: dict[str, dict[str, Any]] = {
    "classifier": {},
    "bias": {"tail_learning_rate": 2e-3},
    "adapter": {"tail_learning_rate": 1e-3},
    "prompt": {"prompt_learning_rate": 2e-3, "tail_learning_rate": 1e-2},
}


class FedPEFT(WholeModel):
    """One prototype of FedPEFT, and the classifier, are tuned and averaged."""

    name: Literal["fedpeft"] = "fedpeft"
    source: ClassVar[str] = "FedPEFT, arXiv 2210.01708"

    tune: Literal["classifier", "bias", "adapter", "prompt"] = Field(
        "bias",
        description="classifier | bias: every bias | adapter: a bottleneck behind each block | "
        "prompt: prompts before each block (VPT-Deep); with the classifier in each case",
    )
    prompt_count: int = Field(10, ge=1, le=1024, description="before each block (tune = prompt)")
    adapter_width: int = Field(
        0, ge=0, le=4096, description="inner width (tune = adapter); 0: an eighth of the model's"
    )

    def defaults(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"training": super().defaults(given)["training"] | _RATES[self.tune]}

    def tuning_part(self, settings: RunSettings) -> Fields:
        if self.tune == "prompt":
            prompts = {"prompt_depth": "deep", "prompt_count": self.prompt_count}
            return {"tune": "classifier"} | prompts
        return {"tune": self.tune}

    def shape_part(self, settings: RunSettings) -> Fields:
        shape = dict(super().shape_part(settings))
        if self.tune == "adapter":
            width = self.adapter_width or max(1, anatomy_of(settings.model).width // NARROWING)
            shape["adapter_width"] = width
        return shape
