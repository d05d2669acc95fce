"""FedPFT: a proxy that is distilled ahead, and its least busy neurons again now and then."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.proxied import Proxied
from protocol.settings import ProxyKind


class FedPft(Proxied):
    """FedPFT (arXiv 2404.11536): LoRA on a proxy whose MLPs are pruned and distilled beforehand.

    Every block stays; LoRA of rank 8 is on the queries and values of all of them, and the
    classifier is tuned. After every tenth round, but not the last, the half of the neurons that
    the devices use least is distilled again.
    """

    name = "fedpft"
    what = (
        "FedPFT: LoRA on a proxy with pruned MLPs, distilled ahead and again every 10 rounds; its "
        "accuracy in the backbone"
    )
    costed_as = "fedpft"
    proxy: ClassVar[ProxyKind] = "pruned"
    recipe: ClassVar[Changes] = {
        "model": {"proxy": "pruned"},
        "training": {"batch_size": 8, "tail_learning_rate": 2e-3},
        "distillation": {"epochs": 5, "every": 10},
    }
