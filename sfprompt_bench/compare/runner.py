"""All tasks of a comparison, several at a time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from rich.console import Console

from protocol.errors import SFPromptError
from sfprompt_bench.compare.config import Comparison, toml_text
from sfprompt_bench.compare.plan import Job, plan, resolved, tasks_of
from sfprompt_bench.compare.results import Outcome, outcomes_of
from sfprompt_bench.compare.tasks import Failure, Figures, Task, perform_all
from sfprompt_bench.compare.worker import FIGURES, JOB, perform
from sfprompt_bench.methods.base import Reference
from sfprompt_bench.methods.registry import get_method
from sfprompt_bench.run.processes import Process, usable_cores

RESOLVED = "comparison.toml"

TASK_FILE = "task.json"

_POLL_S = 3600.0


def run_comparison(
    comparison: Comparison, folder: Path, at_once: int, console: Console
) -> list[Outcome]:
    """Perform all tasks without a result in ``folder``, and write the resolved settings there.

    A failed task is reported in its outcome; the others go on.

    Raises:
        NotFound, InvalidField: a method or a setting is wrong; no task has started then.
    """
    jobs = plan(comparison, folder)
    (folder / RESOLVED).write_text(toml_text(resolved(comparison)))
    results = perform_jobs(jobs, at_once, console)
    return outcomes_of(jobs, results, comparison.target_accuracy)


def perform_jobs(jobs: list[Job], at_once: int, console: Console) -> dict[str, Figures | Failure]:
    """Perform the tasks without a result, and return the result of each task by its key."""
    tasks = tasks_of(jobs)
    threads = max(1, usable_cores() // at_once)

    def perform_task(task: Task) -> Figures:
        if isinstance(get_method(task.inputs["method"]), Reference):
            return _perform_in_process(task, threads)
        return perform(task.inputs, task.folder, threads)

    results = perform_all(
        tasks,
        perform_task,
        file=TASK_FILE,
        at_once=at_once,
        console=console,
        describe=_describe,
    )
    return {task.key: result for task, result in zip(tasks, results, strict=True)}


def _perform_in_process(task: Task, threads: int) -> Figures:
    """Perform a task in a new process. Raises `SFPromptError` with the end of its log."""
    job = {"inputs": task.inputs, "threads": threads}
    (task.folder / JOB).write_text(json.dumps(job, indent=2))
    arguments = ["sfprompt_bench.compare.worker", str(task.folder)]
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


def _describe(task: Task, figures: Figures) -> str:
    accuracy, nbytes = figures["accuracy"], figures["bytes_total"]
    reached = "not measured" if accuracy is None else f"{accuracy:.1%}"
    moved = "" if nbytes is None else f", {nbytes / 1e6:,.2f} MB a device"
    return f"{task.name}: accuracy {reached}{moved}, {figures['seconds']:,.0f} s"
