"""FedPEFT with the biases."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.whole_model import WholeModel


class FedPeftBias(WholeModel):
    """FedPEFT-Bias (arXiv 2210.01708): every bias of the model, and the classifier."""

    name = "fedpeft-bias"
    what = "FedPEFT: all biases and the classifier"
    costed_as = "fedpeft-bias"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 2e-3}}
    tuned = "bias"
