"""Settings of SplitFed in U-shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from protocol.method import Fields, MethodSettings

if TYPE_CHECKING:
    from protocol.settings import RunSettings


class SplitFed(MethodSettings):
    """Head and tail on the device, the body on the server, no prompts, no pruning.

    Source: SplitFed (arXiv 2004.12088).
    """

    name: Literal["splitfed"] = "splitfed"
    source: ClassVar[str] = "SplitFed, arXiv 2004.12088"
    device: ClassVar[str] = "tuning_methods.splitfed.device:SplitFedDevice"
    server: ClassVar[str] = "tuning_methods.splitfed.server:SplitFedServer"

    tune: Literal["linear", "full"] = Field(
        "linear",
        description="linear: the tail's last layer | full: head, body and tail; the server tunes a "
        "copy of the body for each participant and averages the copies",
    )
    cut: int = Field(1, ge=0, le=256, description="blocks in the head, on the device")
    tail_blocks: int = Field(0, ge=0, le=256, description="last blocks, which the tail runs")
    split_epochs: int = Field(1, ge=1, le=10_000, description="epochs a round over all samples")

    def defaults(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        rate = 5e-5 if self.tune == "full" else 2e-2
        shared = {"batch_size": 8, "prompt_learning_rate": 1e-2, "warmup_rounds": 1}
        return {"training": {**shared, "tail_learning_rate": rate}}

    def model_part(self, settings: RunSettings) -> Fields:
        full = self.tune == "full"
        return {
            "prompt_at": "input",
            "prompt_count": 0,
            "cut": self.cut,
            "tail_blocks": self.tail_blocks,
            "tune": "full" if full else "classifier",
            "tune_body": full,
        }

    def training_part(self, settings: RunSettings) -> Fields:
        return {
            "keep_fraction": 1.0,
            "pruning": "random",
            "local_epochs": 0,
            "split_epochs": self.split_epochs,
        }
