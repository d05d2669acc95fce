"""One task of a comparison: a run with server and devices, or a reference in this process.

``python -m sfprompt_bench.compare.worker FOLDER`` performs the task in FOLDER/job.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from edge_client.data.dataset import Dataset, limit_per_set
from edge_client.data.errors import DataError
from edge_client.data.pictures import parse_colour
from edge_client.data.sources import load_dataset
from protocol.errors import SFPromptError
from protocol.messages import parse_message
from protocol.settings import RunSettings
from sfprompt_bench.compare.metrics import (
    calculated,
    device_accuracies,
    reference_figures,
    run_figures,
)
from sfprompt_bench.compare.proxies import (
    backbone_accuracy,
    with_backbone_accuracy,
    write_distillation_images,
)
from sfprompt_bench.compare.tasks import Figures
from sfprompt_bench.compare.usage import UsageWatch
from sfprompt_bench.methods.base import FederatedMethod, Reference
from sfprompt_bench.methods.registry import get_method
from sfprompt_bench.run.local_run import LocalRun
from split_model.checkpoints.state import load_state

JOB, FIGURES = "job.json", "figures.json"

_MAX_SEED = 2**31  # of the data's partition, as `LocalRun` passes it to devices


def main() -> None:
    """Perform a task; an error becomes one line and exit code 2."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / JOB).read_text())
    try:
        figures = perform(job["inputs"], folder, job["threads"])
    except (SFPromptError, DataError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")


def perform(inputs: dict[str, Any], folder: Path, threads: int) -> Figures:
    """Perform a task and return its figures.

    Args:
        inputs: of the task (`Task.inputs`).
        folder: of the task.
        threads: CPU threads of the server's body, or of the reference.

    Raises:
        SFPromptError, DataError: the task failed.
    """
    method = get_method(inputs["method"])
    settings = parse_message(RunSettings, inputs["settings"])
    if isinstance(method, FederatedMethod):
        return _run(method, settings, inputs, folder, threads)
    if isinstance(method, Reference):
        return _measure(method, settings, inputs, threads)
    raise TypeError(f"{method.name} is neither federated nor a reference")


def _measure(
    method: Reference, settings: RunSettings, inputs: dict[str, Any], threads: int
) -> Figures:
    torch.set_num_threads(threads)
    data = _pooled_data(settings, inputs)
    started = time.monotonic()
    result = method.measure(settings, data, lambda done, total: None)
    seconds = time.monotonic() - started
    return reference_figures(result, seconds)


def _pooled_data(settings: RunSettings, inputs: dict[str, Any]) -> Dataset:
    """Load the images of all devices of a run together."""
    train, test = inputs["limits"]
    seed = settings.seed % _MAX_SEED
    data = load_dataset(
        inputs["data"],
        seed=seed,
        class_names=settings.class_names,
        background=parse_colour(settings.model.background),
    )
    return limit_per_set(data, train=train, test=test, shots=inputs["shots"], seed=seed)


def _run(
    method: FederatedMethod,
    settings: RunSettings,
    inputs: dict[str, Any],
    folder: Path,
    threads: int,
) -> Figures:
    train, test = inputs["limits"]
    run = LocalRun(
        settings=settings,
        data=inputs["data"],
        devices=inputs["devices"],
        partition=inputs["partition"],
        folder=folder,
        server_threads=threads,
        limit_train=train,
        limit_test=test,
        link=inputs["link"],
        shots=inputs["shots"],
    )
    server_folder = folder / "server"
    write_distillation_images(settings.plan, server_folder)
    with UsageWatch(folder) as watch, (folder / "run.log").open("w") as log:
        results, summary = run.execute(Console(file=log))
    state = load_state(folder / "tuned.safetensors")
    figures = run_figures(
        results,
        seconds=summary["seconds"],
        trainable_parameters=sum(tensor.numel() for tensor in state.values()),
        devices=watch.devices(),
        server=watch.server(),
        by_device=device_accuracies(server_folder, results.run.id),
    )
    if settings.plan.model.is_reshaped:
        data, cache = _pooled_data(settings, inputs), server_folder / "backbones"
        accuracy = backbone_accuracy(settings.plan, state, data, cache)
        figures = with_backbone_accuracy(figures, accuracy)
    history = "".join(view.model_dump_json() + "\n" for view in results.rounds)
    (folder / "history.jsonl").write_text(history)
    # Weights and states of each device and round are large; the rest of the folder is small.
    for place in (server_folder, folder / "devices"):
        shutil.rmtree(place, ignore_errors=True)
    return figures | calculated(method, settings.plan, results)


if __name__ == "__main__":
    main()
