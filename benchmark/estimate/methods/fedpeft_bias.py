"""FedPEFT with the biases."""

from __future__ import annotations

from benchmark.estimate.memory import passed_blocks
from benchmark.estimate.methods.whole_model import WholeModelMethod
from benchmark.estimate.sizes import forward_flops, parameters
from split_model import SplitSettings, anatomy


class FedPeftBias(WholeModelMethod):
    """FedPEFT-Bias (arXiv 2210.01708): every bias of the model, and the classifier.

    A visit is a forward pass, the gradient of the inputs back to the patch embedding's bias, and
    the gradient of the classifier's weights. That of a bias is a sum and counts nothing.
    """

    name = "fedpeft-bias"

    def trained(self, settings: SplitSettings) -> int:
        own = parameters(settings)
        return own.classifier + own.other_biases

    def visit_flops(self, settings: SplitSettings) -> int:
        flops = forward_flops(settings)
        return flops.whole + flops.behind_embedding + parameters(settings).classifier_flops

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return passed_blocks(settings, sizes.depth, sizes.tokens)
