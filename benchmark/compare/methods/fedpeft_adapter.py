"""FedPEFT with an adapter."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.whole_model import WholeModel
from split_model import Anatomy

_NARROWING = 8  # 96 of 768 in ViT-B


class FedPeftAdapter(WholeModel):
    """FedPEFT-Adapter (arXiv 2210.01708): one bottleneck for all blocks, and the classifier."""

    name = "fedpeft-adapter"
    what = "FedPEFT: one bottleneck behind every block, and the classifier"
    costed_as = "fedpeft-adapter"
    recipe: ClassVar[Changes] = {"training": {"batch_size": 8, "tail_learning_rate": 1e-3}}
    tuned = "adapter"

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        return {"adapter_width": max(1, sizes.width // _NARROWING)}
