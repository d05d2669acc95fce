"""Federated full fine-tuning."""

from __future__ import annotations

from benchmark.estimate.memory import trained_blocks
from benchmark.estimate.methods.whole_model import WholeModelMethod
from benchmark.estimate.sizes import bytes_of, forward_flops, parameters
from split_model import SplitSettings, anatomy


class FullFineTuning(WholeModelMethod):
    """FedAvg of the whole model (arXiv 1602.05629): 2|W| a round, 3x forward a visit."""

    name = "fl-full"

    def trained(self, settings: SplitSettings) -> int:
        return parameters(settings).every

    def sent_per_round(self, settings: SplitSettings) -> int:
        return bytes_of(settings).backbone  # buffers are part of the state too

    def visit_flops(self, settings: SplitSettings) -> int:
        return 3 * forward_flops(settings).whole

    def activations(self, settings: SplitSettings) -> int:
        sizes = anatomy(settings)
        return trained_blocks(settings, sizes.depth, sizes.tokens)
