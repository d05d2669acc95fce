"""A comparison's tasks, each done by processes of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from edge_client.data import DataError, Dataset, limit_per_set, load_dataset
from protocol.errors import SFPromptError
from protocol.messages import parse_message
from protocol.plan import RunPlan
from sfprompt_bench.compare.config import Comparison, toml_text
from sfprompt_bench.compare.methods import Method, Reference, method_named
from sfprompt_bench.compare.metrics import (
    UsageWatch,
    calculated,
    device_accuracies,
    reference_figures,
    run_figures,
)
from sfprompt_bench.compare.plan import plan, resolved, tasks_of
from sfprompt_bench.compare.references import give_images, of_backbone, plugged_in_accuracy
from sfprompt_bench.compare.results import Outcome, outcomes_of
from sfprompt_bench.compare.tasks import Failure, Figures, Task, perform_all
from sfprompt_bench.run.local_run import LocalRun
from sfprompt_bench.run.processes import Process, usable_cores
from split_model import load_state

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
    settings = parse_message(RunPlan, of["settings"])
    if isinstance(method, Reference):
        return _refer(method, settings, of, threads)
    return _run(method, settings, of, folder, threads)


def _refer(method: Reference, settings: RunPlan, of: dict[str, Any], threads: int) -> Figures:
    torch.set_num_threads(threads)
    data = _heap(settings, of)
    started = time.monotonic()
    measured = method.measure(settings, data, lambda done, total: None)
    seconds = time.monotonic() - started
    return reference_figures(measured.accuracy, measured.trainable_parameters, seconds)


def _heap(settings: RunPlan, of: dict[str, Any]) -> Dataset:
    """The images that the devices of a run have together."""
    train, test = of["limits"]
    seed = settings.seed % _SEEDS
    data = load_dataset(of["data"], seed=seed, class_names=settings.class_names)
    return limit_per_set(data, train=train, test=test, shots=of["shots"], seed=seed)


def _run(
    method: Method, settings: RunPlan, of: dict[str, Any], folder: Path, threads: int
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

RESOLVED = "comparison.toml"

_TASK = "task.json"

_POLL_S = 3600.0


def run_comparison(
    comparison: Comparison, folder: Path, at_once: int, console: Console
) -> list[Outcome]:
    """Do all tasks that are not done in ``folder`` yet; leave the resolved file there.

    A task that fails is told of in its outcome and keeps no other from being done.

    Raises:
        NotFound, InvalidField: a method or a setting is wrong; then nothing has been begun.
    """
    jobs = plan(comparison, folder)
    text = toml_text(resolved(comparison))
    (folder / RESOLVED).write_text(text)
    tasks = tasks_of(jobs)
    threads = max(1, usable_cores() // at_once)

    def do(task: Task) -> Figures:
        if isinstance(method_named(task.of["method"]), Reference):
            return _in_a_process(task, threads)
        return perform(task.of, task.folder, threads)

    done = perform_all(tasks, do, file=_TASK, at_once=at_once, console=console, say=_line)
    by_key: dict[str, Figures | Failure] = {
        task.key: found for task, found in zip(tasks, done, strict=True)
    }
    return outcomes_of(jobs, by_key, comparison.target_accuracy)


def _in_a_process(task: Task, threads: int) -> Figures:
    """Raises `SFPromptError` with the end of the worker's log if it fails."""
    (task.folder / JOB).write_text(json.dumps({"of": task.of, "threads": threads}, indent=2))
    arguments = ["sfprompt_bench.compare.runner", str(task.folder)]
    worker = Process("worker", arguments, task.folder, threads=threads)
    try:
        while (code := _exit_code(worker)) is None:
            pass
    finally:
        worker.stop()
    if code:
        raise SFPromptError(
            worker.last_lines(5) or f"ended with exit code {code}", field=str(worker.log)
        )
    figures: Figures = json.loads((task.folder / FIGURES).read_text())
    return figures


def _exit_code(worker: Process) -> int | None:
    try:
        return worker.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _line(task: Task, figures: Figures) -> str:
    accuracy, moved = figures["accuracy"], figures["bytes_total"]
    shown = "not measured" if accuracy is None else f"{accuracy:.1%}"
    sent = "" if moved is None else f", {moved / 1e6:,.2f} MB a device"
    return f"{task.name}: accuracy {shown}{sent}, {figures['seconds']:,.0f} s"
