"""How one task is done; and, as ``python -m benchmark.compare.worker FOLDER``, in a process.

That reads ``job.json`` in the folder, and leaves ``figures.json`` there. A run over the wire has
processes of its own anyway; a reference computes here and is given one.
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

from benchmark.compare.evaluations import device_accuracies
from benchmark.compare.figures import calculated, reference_figures, run_figures
from benchmark.compare.methods import Method, Reference, method_named
from benchmark.compare.plugged_in import give_images, of_backbone, plugged_in_accuracy
from benchmark.compare.tasks import Figures
from benchmark.compare.usage import UsageWatch
from benchmark.local_run import LocalRun
from edge_client.data import DataError, Dataset, limit_per_set, load_dataset
from protocol.errors import SFPromptError
from protocol.messages import parse_message
from protocol.settings import RunSettings
from split_model import load_state
from split_model.model_errors import model_errors

JOB, FIGURES = "job.json", "figures.json"
_SEEDS = 2**31  # of the data's parts, as `LocalRun` tells them to devices


def main() -> None:
    """Do the task, or say in one line why not, with exit code 2."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / JOB).read_text())
    try:
        figures = perform(job["of"], folder, job["threads"])
    except (SFPromptError, DataError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")


def perform(of: dict[str, Any], folder: Path, threads: int) -> Figures:
    """The figures of a task. ``threads``: of the body, or of a reference.

    Raises:
        SFPromptError, DataError: it cannot be done.
    """
    method = method_named(of["method"])
    settings = parse_message(RunSettings, of["settings"])
    with model_errors():
        if isinstance(method, Reference):
            return _refer(method, settings, of, threads)
        return _run(method, settings, of, folder, threads)


def _refer(method: Reference, settings: RunSettings, of: dict[str, Any], threads: int) -> Figures:
    torch.set_num_threads(threads)
    data = _heap(settings, of)
    started = time.monotonic()
    measured = method.measure(settings, data, lambda done, total: None)
    seconds = time.monotonic() - started
    return reference_figures(measured.accuracy, measured.trainable_parameters, seconds)


def _heap(settings: RunSettings, of: dict[str, Any]) -> Dataset:
    """The images that the devices of a run have together."""
    train, test = of["limits"]
    seed = settings.seed % _SEEDS
    data = load_dataset(of["data"], seed=seed, class_names=settings.class_names)
    return limit_per_set(data, train=train, test=test, shots=of["shots"], seed=seed)


def _run(
    method: Method, settings: RunSettings, of: dict[str, Any], folder: Path, threads: int
) -> Figures:
    train, test = of["limits"]
    local = LocalRun(
        settings=settings,
        data=of["data"],
        devices=of["devices"],
        partition=of["partition"],
        folder=folder,
        server_threads=threads,
        limit_train=train,
        limit_test=test,
        link=of["link"],
        shots=of["shots"],
    )
    give_images(settings, folder / "server")
    with UsageWatch(folder) as watch, (folder / "run.log").open("w") as log:
        results, summary = local.execute(Console(file=log))
    state = load_state(folder / "tuned.safetensors")
    figures = run_figures(
        results,
        seconds=summary["seconds"],
        trainable_parameters=sum(tensor.numel() for tensor in state.values()),
        devices=watch.devices(),
        server=watch.server(),
        by_device=device_accuracies(folder / "server", results.run.id),
    )
    if settings.model.proxy != "none":
        cache = folder / "server" / "backbones"
        found = plugged_in_accuracy(settings, state, _heap(settings, of), cache)
        figures = of_backbone(figures, found)
    history = "".join(view.model_dump_json() + "\n" for view in results.rounds)
    (folder / "history.jsonl").write_text(history)
    # What is left is small: weights and states of every device and round are not.
    for place in ("server", "devices"):
        shutil.rmtree(folder / place, ignore_errors=True)
    return figures | calculated(method.costed_as, method.costed(settings), results)


if __name__ == "__main__":
    main()
