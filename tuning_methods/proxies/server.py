"""The server's side of methods whose devices hold a proxy of the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from protocol.plan import RunPlan
from split_model import BackboneFile, part_bytes, prepare_backbone
from split_server.method import ModelFiles, ModelForExport, ServerMethod
from tuning_methods.proxies.cache import distil_once
from tuning_methods.proxies.distillation import distilled_proxy
from tuning_methods.proxies.weights import plugged, whole_model

_SHAPE = ("proxy", "proxy_ends", "proxy_width", "proxy_blocks")


class ProxyServer(ServerMethod):
    """The run's model is a proxy; what was tuned on it is put into the backbone at export."""

    def backbone_bytes(self, plan: RunPlan) -> int:
        return part_bytes(whole_model(plan.model)).backbone_bytes

    def prepare(self, plan: RunPlan, backbone: BackboneFile, cache_dir: Path) -> ModelFiles:
        """Make the proxy, or find the one of an equal run."""
        return ModelFiles(distil_once(plan, backbone, cache_dir, _SHAPE, distilled_proxy))

    def for_export(
        self, plan: RunPlan, weights: Path, state: Mapping[str, Tensor], cache_dir: Path
    ) -> ModelForExport:
        backbone = prepare_backbone(plan.model, plan.model.weights, cache_dir)
        whole, tuned = plugged(plan.model, state)
        return ModelForExport(whole, backbone.path, tuned, uses_head_file=False)
