"""Settings of federated averaging of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from protocol.method import Fields
from tuning_methods.whole_model import WholeModel

if TYPE_CHECKING:
    from protocol.settings import RunSettings


class FedAvg(WholeModel):
    """Federated full fine-tuning: every weight is trained on the device and averaged."""

    name: Literal["fedavg"] = "fedavg"
    source: ClassVar[str] = "FedAvg, arXiv 1602.05629"
    rates: ClassVar[dict[str, Any]] = {"tail_learning_rate": 5e-5}

    def tuning_part(self, settings: RunSettings) -> Fields:
        return {"tune": "full"}
