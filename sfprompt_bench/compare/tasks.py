"""Tasks that run several at a time, each in its folder, and not again once they have a result."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge_client.data.errors import DataError
from protocol.errors import SFPromptError
from sfprompt_bench.run.processes import end_processes

Figures = dict[str, Any]  # a task's result, as JSON values

Failure = SFPromptError | DataError

_STOP_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Task:
    """A unit of work with a result that depends on its inputs alone.

    Attributes:
        name: for people.
        folder: of this task alone; it is emptied before the task starts.
        inputs: everything that the result depends on, as JSON values.
    """

    name: str
    folder: Path
    inputs: dict[str, Any]

    @property
    def key(self) -> str:
        """The hash of the inputs: two tasks with one key have the same result."""
        return task_key(self.inputs)


def task_key(inputs: dict[str, Any]) -> str:
    """Hash a task's inputs: SHA-256 over their JSON, in hexadecimal."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_figures(task: Task, file: str) -> Figures | None:
    """Read the result that an earlier run of the same task wrote to ``file``; None without one."""
    try:
        record = json.loads((task.folder / file).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("of") != task.inputs:
        return None
    figures: Figures | None = record.get("figures")
    return figures


def perform_all(
    tasks: Sequence[Task],
    perform: Callable[[Task], Figures],
    *,
    file: str,
    at_once: int,
    console: Console,
    describe: Callable[[Task, Figures], str],
) -> list[Figures | Failure]:
    """Perform all tasks without a result and return the figures or the error of each, in order.

    Args:
        tasks: to perform.
        perform: performs one task, whose folder exists and is empty. Called from several threads.
        file: name of the result's file in a task's folder.
        at_once: number of tasks that run at the same time.
        console: for the progress bar and a line for each task.
        describe: a line for people about a finished task.
    """
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
        ThreadPoolExecutor(at_once) as threads,
    ):
        bar = progress.add_task("runs", total=len(tasks))
        stopping = threading.Event()

        def perform_task(task: Task) -> Figures | Failure:
            try:
                figures = _perform_once(task, perform, file)
            except (SFPromptError, DataError) as error:
                if not stopping.is_set():  # otherwise it failed because its processes were ended
                    text = f"  {task.name}: {error}"
                    progress.console.print(text, style="red", highlight=False, markup=False)
                return error
            finally:
                progress.advance(bar)
            progress.console.print(f"  {describe(task, figures)}")
            return figures

        futures: list[Future[Figures | Failure]] = []
        try:  # a signal may arrive as soon as the first task has started a process
            futures.extend(threads.submit(perform_task, task) for task in tasks)
            return [future.result() for future in futures]
        except BaseException:
            stopping.set()
            threads.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                end_processes()  # repeatedly: a task may be about to start one
                time.sleep(_STOP_INTERVAL_S)
            raise


def _perform_once(task: Task, perform: Callable[[Task], Figures], file: str) -> Figures:
    known = read_figures(task, file)
    if known is not None:
        return known
    shutil.rmtree(task.folder, ignore_errors=True)  # files of an interrupted run
    task.folder.mkdir(parents=True)
    figures = perform(task)
    record = {"key": task.key, "of": task.inputs, "figures": figures}
    partial = task.folder / f"{file}.part"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(task.folder / file)  # a reader sees the whole file or none
    return figures
