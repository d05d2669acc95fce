"""Federated methods whose devices hold a smaller proxy of the backbone."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmark.compare.methods.method import changed
from benchmark.compare.methods.whole_model import WholeModel
from protocol.settings import ProxyKind, RunSettings
from split_model import Anatomy, SplitSettings, anatomy
from split_model.model_errors import model_errors


class Proxied(WholeModel):
    """The whole proxy is the head; what was tuned on it is put into the backbone.

    It is the backbone's accuracy that a comparison shows; devices measure the proxy's.

    Attributes:
        proxy: its kind, as ``model.proxy`` names it.
    """

    proxy: ClassVar[ProxyKind]
    tuned = "lora"

    def settings(self, base: RunSettings) -> RunSettings:
        proxied = super().settings(base)
        with model_errors():
            uncut = SplitSettings.of(proxied.model.model_copy(update={"cut": 0}))
            depth = anatomy(uncut).depth
        return changed(proxied, {"model": {"cut": depth} | self.chosen(base)})

    def added(self, sizes: Anatomy) -> dict[str, Any]:
        return {"proxy": self.proxy}

    def chosen(self, base: RunSettings) -> dict[str, int]:
        """Which blocks are tuned, as settings of the model."""
        return {"lora_ends": 0}

    def costed(self, settings: RunSettings) -> RunSettings:
        return settings
