"""The server's side of methods whose devices train a proxy of the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from protocol.plan import RunPlan
from split_model.backbone.weights import BackboneFile, prepare_backbone
from split_model.parts.cost import part_bytes
from split_server.method import ModelFiles, ModelForExport, ServerMethod
from tuning_methods.proxies.cache import distil_once
from tuning_methods.proxies.distillation import distil_proxy
from tuning_methods.proxies.weights import backbone_plan, check_tuned, insert_into_backbone

# Fields of the plan that decide which of a proxy's tensors there are, and which are distilled.
_SHAPE_FIELDS = ("blocks", "mlp_widths", "tune", "lora_ends")


class ProxyServer(ServerMethod):
    """The run's model is a proxy; an export puts the tuned state into the backbone.

    Source: offsite-tuning (arXiv 2302.04870), FedPFT (arXiv 2404.11536).
    """

    def check(self, plan: RunPlan) -> None:
        super().check(plan)
        check_tuned(plan.model)

    def backbone_bytes(self, plan: RunPlan) -> int:
        return part_bytes(backbone_plan(plan.model)).backbone_bytes

    def prepare(self, plan: RunPlan, backbone: BackboneFile, cache_dir: Path) -> ModelFiles:
        """Distil the proxy, or take it from the cache; equal runs share it."""
        shape = {field: getattr(plan.model, field) for field in _SHAPE_FIELDS}
        return ModelFiles(distil_once(plan, backbone, cache_dir, shape, distil_proxy))

    def prepare_export(
        self, plan: RunPlan, weights: Path, state: Mapping[str, Tensor], cache_dir: Path
    ) -> ModelForExport:
        """Export the whole backbone with the state that was tuned on the proxy."""
        backbone = prepare_backbone(plan.model, plan.model.weights, cache_dir)
        full, full_state = insert_into_backbone(plan.model, state)
        return ModelForExport(full, backbone.path, full_state, uses_head_file=False)
