"""FedPEFT with the classifier alone."""

from __future__ import annotations

from benchmark.compare.methods.whole_model import WholeModel


class FedPeftHead(WholeModel):
    """FedPEFT's head-tuning (arXiv 2210.01708): the classifier, on frozen features."""

    name = "fedpeft-head"
    what = "FedPEFT: the classifier alone, the whole frozen model on the device"
    costed_as = "fedpeft-head"
    tuned = "classifier"
