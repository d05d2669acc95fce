"""Tasks that are done once: each in a folder of its own, several at a time, resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge_client.data import DataError
from protocol.errors import SFPromptError
from sfprompt_bench.run.processes import end_processes

Figures = dict[str, Any]  # what came of a task, as JSON carries it

Failure = SFPromptError | DataError

_ENDING_S = 0.5


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        name: for people.
        folder: its own; emptied before it is begun.
        of: everything that its result depends on, as JSON carries it.
    """

    name: str
    folder: Path
    of: dict[str, Any]

    @property
    def key(self) -> str:
        """The hash of `of`: two tasks with one key have one result."""
        return task_key(self.of)


def task_key(of: dict[str, Any]) -> str:
    """SHA-256 over the JSON of everything that a result depends on, in hexadecimal."""
    text = json.dumps(of, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def known_figures(task: Task, file: str) -> Figures | None:
    """What an earlier run of the very same task left in ``file`` of its folder, if one did."""
    try:
        found = json.loads((task.folder / file).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("of") != task.of:
        return None
    figures: Figures | None = found.get("figures")
    return figures


def perform_all(
    tasks: Sequence[Task],
    perform: Callable[[Task], Figures],
    *,
    file: str,
    at_once: int,
    console: Console,
    say: Callable[[Task, Figures], str],
) -> list[Figures | Failure]:
    """Do every task that is not done yet, and tell the figures or the error of each, in order.

    Args:
        perform: does one; called from several threads. Its folder is there, and empty.
        file: where in its folder a task's figures are kept.
        at_once: tasks at a time.
        say: a line for people about a task that is done.
    """
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
        ThreadPoolExecutor(at_once) as workers,
    ):
        bar = progress.add_task("runs", total=len(tasks))
        stopping = threading.Event()

        def one(task: Task) -> Figures | Failure:
            try:
                figures = _perform_once(task, perform, file)
            except (SFPromptError, DataError) as error:
                if not stopping.is_set():  # else it failed because its processes were ended
                    text = f"  {task.name}: {error}"
                    progress.console.print(text, style="red", highlight=False, markup=False)
                return error
            finally:
                progress.advance(bar)
            progress.console.print(f"  {say(task, figures)}")
            return figures

        waiting = [workers.submit(one, task) for task in tasks]
        try:
            return [done.result() for done in waiting]
        except BaseException:
            stopping.set()
            workers.shutdown(wait=False, cancel_futures=True)  # what is not begun never is
            while not all(done.done() for done in waiting):
                end_processes()  # again and again: a task may be about to start one
                time.sleep(_ENDING_S)
            raise


def _perform_once(task: Task, perform: Callable[[Task], Figures], file: str) -> Figures:
    known = known_figures(task, file)
    if known is not None:
        return known
    shutil.rmtree(task.folder, ignore_errors=True)  # what an interrupted run left counts for nobody
    task.folder.mkdir(parents=True)
    figures = perform(task)
    kept = {"key": task.key, "of": task.of, "figures": figures}
    partial = task.folder / f"{file}.part"
    partial.write_text(json.dumps(kept, indent=2) + "\n")
    partial.replace(task.folder / file)  # whole or not at all
    return figures
