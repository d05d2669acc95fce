"""FedPEFT with the classifier alone."""

from __future__ import annotations

from benchmark.estimate.memory import run_blocks
from benchmark.estimate.methods.whole_model import WholeModelMethod
from benchmark.estimate.sizes import forward_flops, parameters
from split_model import SplitSettings, anatomy


class FedPeftHead(WholeModelMethod):
    """FedPEFT's "head-tuning" (arXiv 2210.01708): the classifier, on frozen features.

    A visit is a forward pass and the gradient of the classifier's weights.
    """

    name = "fedpeft-head"

    def trained(self, settings: SplitSettings) -> int:
        return parameters(settings).classifier

    def visit_flops(self, settings: SplitSettings) -> int:
        return forward_flops(settings).whole + parameters(settings).classifier_flops

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return run_blocks(settings, sizes.depth, sizes.tokens)
