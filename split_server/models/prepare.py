"""What a run needs of its model before it can begin: backbone, head file, first global state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import split_model
from protocol.messages import BlobRef
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from split_server.federation.snapshot import RunSnapshot
from split_server.models.proxies import prepare_local_body, prepare_proxy, write_redistilled_proxy
from split_server.storage.run_files import RunFiles, StateRefs
from tuning_methods.proxies.neurons import neurons_shape
from tuning_methods.proxies.weights import whole_model


@dataclass(frozen=True)
class PreparedRun:
    """The model's files of a new run."""

    backbone_path: Path  # the weights of the run's model: a proxy's, where it is one
    backbone_bytes: int  # of the uncut model with its classifier, in float32
    head: BlobRef
    state: StateRefs


@dataclass(frozen=True)
class RedistilledModel:
    """The model's files of a run after its proxy was distilled again."""

    backbone_path: Path
    head: BlobRef


def prepare_run(settings: RunPlan, files: RunFiles, cache_dir: Path) -> PreparedRun:
    """Fetch or make the backbone or proxy, and write the head file and the first global state.

    Takes seconds, or minutes where weights are downloaded or distilled: never call it on the
    event loop.

    Raises:
        InvalidField: the model cannot be had, or cannot be cut as the settings ask.
    """
    split = settings.model
    split_model.part_bytes(split)  # refuses what cannot be cut, ahead of any work
    if settings.distillation.every:
        neurons_shape(split)  # refuses a proxy that devices do not have whole
    sizes = split_model.part_bytes(whole_model(split))
    backbone = split_model.prepare_backbone(split, settings.model.weights, cache_dir)
    path = prepare_proxy(settings, split, backbone, cache_dir)
    local_body = prepare_local_body(settings, split, backbone, cache_dir)
    weights = split_model.open_backbone(path)
    seed = derive_seed(settings.seed, "initial-state")
    state = split_model.initial_state(split, weights, seed)
    head, sha256 = split_model.write_head_file(
        split, path, files.head, settings.wire.head, local_body
    )
    return PreparedRun(
        backbone_path=path,
        backbone_bytes=sizes.backbone_bytes,
        head=BlobRef(sha256=sha256, nbytes=head.stat().st_size),
        state=files.write_state(state, settings.model.prompt_at),
    )


def redistill_run(
    run: RunSnapshot, files: RunFiles, cache_dir: Path, check: Callable[[], None]
) -> RedistilledModel:
    """Distil a run's proxy again after its last closed round, and write the new head file.

    What a run was stopped in is found or made again, the same. Takes minutes, like `prepare_run`.

    Args:
        check: is called now and then; what it raises ends the work.

    Raises:
        InvalidField: the images or the backbone are not there any more, or cannot be used.
        NonFinite: the distillation has diverged.
        NotFound: what the devices have told is gone.
    """
    settings, round_ = run.plan, run.closed_rounds
    proxy, head = files.proxy_after(round_), files.head_after(round_)
    split = settings.model
    if not proxy.is_file():
        backbone = split_model.prepare_backbone(split, settings.model.weights, cache_dir)
        state = files.read_state(StateRefs(run.state, run.held))
        inactive = files.read_neurons(round_)
        write_redistilled_proxy(run, split, backbone, state, inactive, cache_dir, proxy, check)
    _, sha256 = split_model.write_head_file(split, proxy, head, settings.wire.head)
    return RedistilledModel(proxy, BlobRef(sha256=sha256, nbytes=head.stat().st_size))
