"""A comparison's tasks, each done by processes of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from rich.console import Console

from benchmark.compare.comparison import Comparison
from benchmark.compare.methods import Reference, method_named
from benchmark.compare.outcome import Outcome, outcomes_of
from benchmark.compare.plan import plan, resolved, tasks_of
from benchmark.compare.tasks import Failure, Figures, Task, perform_all
from benchmark.compare.toml_file import toml_text
from benchmark.compare.worker import FIGURES, JOB, perform
from benchmark.processes import Process, usable_cores
from protocol.errors import SFPromptError

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
    arguments = ["benchmark.compare.worker", str(task.folder)]
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
