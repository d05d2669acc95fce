"""Federated full fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.whole_model import WholeModel


class FullFineTuning(WholeModel):
    """FedAvg of the whole model (arXiv 1602.05629)."""

    name = "fl-full"
    what = "federated full fine-tuning: every weight is trained on the device and averaged"
    costed_as = "fl-full"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 5e-5}}
    tuned = "full"
