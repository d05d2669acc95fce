"""Offsite-tuning."""

from __future__ import annotations

from typing import ClassVar

from benchmark.compare.methods.method import Changes
from benchmark.compare.methods.proxied import Proxied
from protocol.settings import ProxyKind, RunSettings


class OffsiteTuning(Proxied):
    """Offsite-tuning (arXiv 2302.04870): the blocks at both ends are tuned, others dropped evenly.

    The adapters are the first and the last blocks, here by LoRA on their queries and values, and
    the classifier; the emulator between them is the backbone's blocks, fewer, and not distilled.
    """

    name = "offsite-tuning"
    what = "offsite-tuning: LoRA on the end blocks, fewer blocks between; accuracy in the backbone"
    costed_as = "offsite-tuning"
    proxy: ClassVar[ProxyKind] = "dropped"
    recipe: ClassVar[Changes] = {
        "model": {"proxy": "dropped"},
        "training": {"batch_size": 8, "tail_learning_rate": 2e-3},
    }

    def chosen(self, base: RunSettings) -> dict[str, int]:
        return {"lora_ends": base.model.proxy_ends}
