"""Offsite-tuning."""

from __future__ import annotations

from typing import ClassVar

from benchmark.estimate.methods.proxied import ProxiedMethod
from protocol.settings import ProxyKind


class OffsiteTuning(ProxiedMethod):
    """Offsite-tuning (arXiv 2302.04870): half of the blocks; LoRA of rank 8 in first and last."""

    name = "offsite-tuning"
    proxy: ClassVar[ProxyKind] = "dropped"
    tuned_ends: ClassVar[int] = 1
