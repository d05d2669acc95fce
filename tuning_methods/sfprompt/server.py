"""The server's side of SFPrompt as published: distils the devices' local body."""

from __future__ import annotations

from pathlib import Path

from protocol.plan import RunPlan
from split_model import BackboneFile
from split_model.backbone.tensor_file import TensorFile
from split_server.method import ModelFiles, ServerMethod
from tuning_methods.proxies.cache import distil_once
from tuning_methods.sfprompt.local_body import distil_local_body

_SHAPE = ("local_body", "cut", "tail_blocks")


class SFPromptPaperServer(ServerMethod):
    """The head file carries the local body, if the run has one."""

    def prepare(self, plan: RunPlan, backbone: BackboneFile, cache_dir: Path) -> ModelFiles:
        if not plan.model.local_body:
            return super().prepare(plan, backbone, cache_dir)
        path = distil_once(plan, backbone, cache_dir, _SHAPE, distil_local_body)
        return ModelFiles(backbone.path, TensorFile(path))
