"""The server's side of SFPrompt as published: local bodies, and deltas of smashed data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from protocol.errors import InvalidField
from protocol.plan import RunPlan
from split_model.backbone.tensor_file import TensorFile
from split_model.backbone.weights import BackboneFile
from split_server.http.handlers import (
    Handler,
    HandlerContext,
    Reply,
    Submit,
    handle_forward,
    missing_reply,
    owner_of,
    submit_forward,
)
from split_server.method import ModelFiles, ServerMethod
from split_server.payloads.requests import SplitRequest
from tuning_methods.proxies.cache import distil_once
from tuning_methods.sfprompt.local_body import check_local_body, distil_local_body
from tuning_methods.sfprompt.server_deltas import apply_deltas, parse_delta_forward
from tuning_methods.sfprompt.settings import paper_part


class SFPromptPaperServer(ServerMethod):
    """The head file carries the local body, and forwards may carry deltas, if the run has these."""

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {"forward": _handle_forward}

    def check(self, plan: RunPlan) -> None:
        super().check(plan)
        check_local_body(plan.model, paper_part(plan).local_body)

    def prepare(self, plan: RunPlan, backbone: BackboneFile, cache_dir: Path) -> ModelFiles:
        num_blocks = paper_part(plan).local_body
        if not num_blocks:
            return super().prepare(plan, backbone, cache_dir)
        model = plan.model
        shape = {"local_body": num_blocks, "cut": model.cut, "tail_blocks": model.tail_blocks}
        distil = partial(distil_local_body, num_blocks)
        path = distil_once(plan, backbone, cache_dir, shape, distil)
        return ModelFiles(backbone.path, TensorFile(path))


def _handle_forward(context: HandlerContext, request: SplitRequest) -> Submit | Reply:
    """Run a batch forward; smashed data that are sent as deltas are rebuilt first.

    Deltas are added on the CPU wherever the body runs: the device adds the same numbers, and the
    results must agree bit for bit.
    """
    if "ids" not in request.frame.specs:
        return handle_forward(context, request)
    if paper_part(request.plan).delta_smashed is None:
        raise InvalidField(
            "the server caches no smashed data for deltas in this run; send whole batches",
            field="delta_smashed",
            limit="a codec",
        )
    forward = parse_delta_forward(request)
    rebuilt = apply_deltas(context.services.samples, owner_of(request), forward.batch)
    if isinstance(rebuilt, list):
        return missing_reply(rebuilt)
    return submit_forward(context, request, forward.meta, rebuilt.to(request.device))
