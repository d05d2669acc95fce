"""FedPEFT with an adapter."""

from __future__ import annotations

from benchmark.estimate.memory import passed_blocks
from benchmark.estimate.methods.whole_model import WholeModelMethod
from benchmark.estimate.sizes import forward_flops, parameters
from split_model import SplitSettings, anatomy

_NARROWING = 8


class FedPeftAdapter(WholeModelMethod):
    """FedPEFT-Adapter (arXiv 2210.01708): one bottleneck D -> D/8 -> D, and the classifier.

    All blocks share the bottleneck; it acts on every token behind each of them. A visit is a
    forward pass, the gradient of the inputs back to the end of the first block, and a full
    backward pass of each use of the bottleneck and of the classifier.
    """

    name = "fedpeft-adapter"

    def trained(self, settings: SplitSettings) -> int:
        return parameters(settings).classifier + self.added(settings)

    def added(self, settings: SplitSettings) -> int:
        width, narrow = self._widths(settings)
        return 2 * width * narrow + narrow + width

    def visit_flops(self, settings: SplitSettings) -> int:
        sizes, flops = anatomy(settings), forward_flops(settings)
        width, narrow = self._widths(settings)
        adapters = sizes.depth * sizes.tokens * 2 * (2 * width * narrow)
        passed = flops.behind_embedding - flops.block
        return flops.whole + passed + parameters(settings).classifier_flops + 3 * adapters

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        width, narrow = self._widths(settings)
        # Of each use: its input, and the bottleneck on both sides of the activation function.
        adapters = sizes.depth * sizes.tokens * (width + 2 * narrow)
        return passed_blocks(settings, sizes.depth, sizes.tokens) + adapters

    def _widths(self, settings: SplitSettings) -> tuple[int, int]:
        width = anatomy(settings).width
        return width, width // _NARROWING
