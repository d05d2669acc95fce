"""The project's commands as processes, forked from one that has imported torch.

A process of its own spends nine seconds on imports, more than a small run takes. These run the same
`main`, in a process of their own that can be killed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["split_server.app", "edge_client.participant"])


class CommandProcess:
    """``python -m MODULE ARGUMENTS``, with its output in the log.

    Args:
        module: has the command's `main`.
        arguments: of the command.
        log: file for standard output and standard error.
        cwd: working directory; None: this process's.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, cwd: Path | None = None
    ) -> None:
        self.log = log
        words, folder = [module, *arguments], str(cwd or Path.cwd())
        self._process = _FORKS.Process(
            target=_run_command, args=(words, str(log.absolute()), folder, dict(os.environ))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        """Wait at most so long for the exit code."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        self._process.kill()
        self._process.join()

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, and kill it after ``seconds``."""
        self._process.terminate()
        if self.wait(seconds) is None:
            self.kill()

    def lines(self) -> list[str]:
        """Read its log."""
        return self.log.read_text(errors="replace").splitlines()

    def last_lines(self, count: int = 15) -> str:
        """Read the end of its log."""
        return "\n".join(self.lines()[-count:])


def _run_command(words: list[str], log: str, folder: str, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    importlib.import_module(words[0]).main()
