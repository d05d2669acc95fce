"""FedPFT."""

from __future__ import annotations

from typing import ClassVar

from benchmark.estimate.methods.proxied import ProxiedMethod
from protocol.settings import ProxyKind


class FedPft(ProxiedMethod):
    """FedPFT (arXiv 2404.11536): every block, a quarter of the neurons of those between the ends.

    LoRA of rank 8 in all blocks. What neuron-level distillation moves is left out.
    """

    name = "fedpft"
    proxy: ClassVar[ProxyKind] = "pruned"
