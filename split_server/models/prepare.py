"""Create the model files of a run: its weights, head file and first global state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.errors import InvalidField
from protocol.messages import BlobRef
from protocol.seeds import derive_seed
from protocol.settings import RunSettings
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.head_file import write_head_file
from split_model.checkpoints.state import initial_state
from split_server.method import server_method
from split_server.storage.run_files import RunFiles, StateRefs


@dataclass(frozen=True)
class PreparedRun:
    """The model files of a new run."""

    backbone_path: Path  # the weights of the run's model
    backbone_bytes: int  # of the uncut model with its classifier, in float32
    head: BlobRef
    state: StateRefs


def prepare_run(settings: RunSettings, files: RunFiles, cache_dir: Path) -> PreparedRun:
    """Fetch the backbone, make the run's weights, write the head file and the first global state.

    Takes seconds, or minutes if weights are downloaded or made: do not call it on the event
    loop.

    Raises:
        InvalidField: the model cannot be obtained, or cut as the plan requires.
    """
    try:
        return _prepare(settings, files, cache_dir)
    except InvalidField as error:
        part, dot, field = (error.field or "").partition(".")
        if dot and part == "model":  # name the field that people wrote
            error.field = settings.method.locate(part, field)
        raise


def _prepare(settings: RunSettings, files: RunFiles, cache_dir: Path) -> PreparedRun:
    plan, method = settings.plan, server_method(settings)
    method.check(plan)
    backbone = prepare_backbone(plan.model, plan.model.weights, cache_dir)
    model = method.prepare(plan, backbone, cache_dir)
    weights = open_backbone(model.weights)
    seed = derive_seed(plan.seed, "initial-state")
    state = initial_state(plan.model, weights, seed)
    head, sha256 = write_head_file(
        plan.model, model.weights, files.head, plan.wire.head, model.extras
    )
    return PreparedRun(
        backbone_path=model.weights,
        backbone_bytes=method.backbone_bytes(plan),
        head=BlobRef(sha256=sha256, nbytes=head.stat().st_size),
        state=files.write_state(state, plan.model.prompt_at),
    )
