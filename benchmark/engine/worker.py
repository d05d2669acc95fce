"""A process that does one task after the other: a line of JSON in, a line of JSON out.

What is measured must not share an interpreter with what measures it. A worker is held on its cores
and waits between two tasks, so that others can be measured in turn with it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.engine.cores import held_on
from protocol.errors import SFPromptError

Task = Callable[..., dict[str, Any]]


class Worker:
    """The owner's end.

    Args:
        name: what people call it; its log is ``NAME.log``.
        module: which calls `serve_tasks`.
        folder: of the log.
        cores: on which it stays.
        threads: CPU threads that its libraries may use.
    """

    def __init__(
        self, name: str, module: str, folder: Path, cores: Sequence[int], threads: int
    ) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log, held_on(cores):
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, task: str, **what: Any) -> dict[str, Any]:
        """Have a task done.

        Raises:
            SFPromptError: it failed, or the worker ended; with what it said.
        """
        self.begin(task, **what)
        return self.end()

    def begin(self, task: str, **what: Any) -> None:
        """Have a task begun; `end` takes its result."""
        if self._child.stdin is None:
            raise SFPromptError(f"{self.name} takes no tasks")
        try:
            self._child.stdin.write(json.dumps({"task": task, "what": what}) + "\n")
            self._child.stdin.flush()
        except OSError:
            raise self._ended() from None

    def is_done(self, wait_s: float) -> bool:
        """Whether the task that was begun is done within so many seconds."""
        answers = self._child.stdout
        return answers is None or bool(select.select([answers], [], [], wait_s)[0])

    def end(self) -> dict[str, Any]:
        """The result of the task that was begun.

        Raises:
            SFPromptError: as in `ask`.
        """
        line = self._child.stdout.readline() if self._child.stdout else ""
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SFPromptError(f"{self.name}: {answer['error']}", field=str(self._log))
        result: dict[str, Any] = answer["result"]
        return result

    def stop(self) -> None:
        """End it; what it is doing is lost."""
        self._child.terminate()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def _ended(self) -> SFPromptError:
        lines = self._log.read_text(errors="replace").splitlines()
        return SFPromptError(f"{self.name} ended early:\n" + "\n".join(lines[-15:]))


def serve_tasks(tasks: Mapping[str, Task]) -> None:
    """The worker's end: do what is asked, by the tasks' names, until nobody asks any more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed goes to the log
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": tasks[asked["task"]](**asked["what"])}
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
