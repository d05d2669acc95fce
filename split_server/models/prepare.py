"""Create the model files of a run: backbone or proxy, head file, first global state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import split_model
from protocol.messages import BlobRef
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from split_model.files import sync_folder
from split_server.models.proxies import prepare_local_body, prepare_proxy, write_redistilled_proxy
from split_server.storage.run_files import RunFiles, StateRefs
from tuning_methods.proxies.neurons import neurons_shape
from tuning_methods.proxies.weights import whole_model


@dataclass(frozen=True)
class PreparedRun:
    """The model files of a new run."""

    backbone_path: Path  # the weights of the run's model, or of its proxy
    backbone_bytes: int  # of the uncut model with its classifier, in float32
    head: BlobRef
    state: StateRefs


@dataclass(frozen=True)
class RedistilledModel:
    """The model files of a run after its proxy was distilled again."""

    backbone_path: Path
    head: BlobRef


def prepare_run(plan: RunPlan, files: RunFiles, cache_dir: Path) -> PreparedRun:
    """Fetch the backbone or distil its proxy; write the head file and the first global state.

    Takes seconds, or minutes if weights are downloaded or distilled: do not call it on the event
    loop.

    Raises:
        InvalidField: the model cannot be obtained, or cut as the plan requires.
    """
    split = plan.model
    split_model.part_bytes(split)  # refuses a model that cannot be cut, before any work
    if plan.distillation.every:
        neurons_shape(split)  # refuses a proxy that devices do not hold completely
    sizes = split_model.part_bytes(whole_model(split))
    backbone = split_model.prepare_backbone(split, plan.model.weights, cache_dir)
    path = prepare_proxy(plan, split, backbone, cache_dir)
    local_body = prepare_local_body(plan, split, backbone, cache_dir)
    weights = split_model.open_backbone(path)
    seed = derive_seed(plan.seed, "initial-state")
    state = split_model.initial_state(split, weights, seed)
    head, sha256 = split_model.write_head_file(split, path, files.head, plan.wire.head, local_body)
    return PreparedRun(
        backbone_path=path,
        backbone_bytes=sizes.backbone_bytes,
        head=BlobRef(sha256=sha256, nbytes=head.stat().st_size),
        state=files.write_state(state, plan.model.prompt_at),
    )


def redistill_run(
    plan: RunPlan,
    files: RunFiles,
    cache_dir: Path,
    *,
    round_: int,
    state: StateRefs,
    proxy_path: str | Path,
    check: Callable[[], None],
) -> RedistilledModel:
    """Distil a run's proxy again after a round, and write the new head file.

    After an interruption the work is resumed or repeated, with the same result. Takes minutes,
    like `prepare_run`.

    Args:
        round_: the last closed round.
        state: the global state of this round.
        proxy_path: the weights of the proxy in this round.
        check: called regularly; an exception from it ends the work.

    Raises:
        InvalidField: the images or the backbone are missing or unusable.
        NonFinite: the distillation has diverged.
        NotFound: the neuron statistics of the round are missing.
    """
    proxy, head = files.proxy_after(round_), files.head_after(round_)
    split = plan.model
    if not proxy.is_file():
        write_redistilled_proxy(
            plan,
            split,
            split_model.prepare_backbone(split, plan.model.weights, cache_dir),
            Path(proxy_path),
            files.read_state(state),
            files.read_neurons(round_),
            round_,
            cache_dir,
            proxy,
            check,
        )
    _, sha256 = split_model.write_head_file(split, proxy, head, plan.wire.head)
    for folder in (proxy.parent, head.parent, files.root):
        sync_folder(folder)
    return RedistilledModel(proxy, BlobRef(sha256=sha256, nbytes=head.stat().st_size))
