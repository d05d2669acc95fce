"""FedPEFT with prompts."""

from __future__ import annotations

from benchmark.estimate.memory import passed_blocks
from benchmark.estimate.methods.whole_model import WholeModelMethod
from benchmark.estimate.sizes import forward_flops, parameters
from split_model import SplitSettings, anatomy

_PROMPTS = 10  # ahead of each block, whatever the run's own prompts are


class FedPeftPrompt(WholeModelMethod):
    """FedPEFT-Prompt (arXiv 2210.01708): VPT-Deep (arXiv 2203.12119), and the classifier.

    Ten fresh tokens stand ahead of every block. A visit is a forward pass with them, the gradient
    of the inputs back to the first block's prompts, and that of the classifier's weights.
    """

    name = "fedpeft-prompt"

    def trained(self, settings: SplitSettings) -> int:
        return parameters(settings).classifier + self.added(settings)

    def added(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return sizes.depth * _PROMPTS * sizes.width

    def visit_flops(self, settings: SplitSettings) -> int:
        flops = forward_flops(settings, _PROMPTS)
        return flops.whole + flops.behind_embedding + parameters(settings).classifier_flops

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return passed_blocks(settings, sizes.depth, sizes.tokens + _PROMPTS)
