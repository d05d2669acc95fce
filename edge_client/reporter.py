"""Report a device's progress: for people, or as JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from protocol.printable import printable


class Reporter(Protocol):
    """Receives a device's events and progress."""

    def event(self, kind: str, **data: Any) -> None:
        """Report an event, e.g. ``joined`` or ``trained``, with its data."""

    def advance(self, phase: str, done: int, total: int) -> None:
        """Report that ``done`` of a phase's ``total`` batches are computed."""

    def close(self) -> None:
        """Flush the output and clear the bars."""


class JsonReporter:
    """Prints one JSON object a line; progress at most five times a second."""

    def __init__(self) -> None:
        self._last_progress_s = 0.0

    def event(self, kind: str, **data: Any) -> None:
        sys.stdout.write(json.dumps({"event": kind, **data}) + "\n")
        sys.stdout.flush()

    def advance(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_progress_s >= 0.2:
            self._last_progress_s = now
            self.event("progress", phase=phase, done=done, total=total)

    def close(self) -> None:
        sys.stdout.flush()


class BarReporter:
    """Shows a bar for the current phase on a terminal, and prints a line for every event."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task("waiting", total=None)

    def event(self, kind: str, **data: Any) -> None:
        if set(data) == {"reason"}:
            line = f"[bold]{kind}[/bold]: {escape(printable(str(data['reason'])))}"
        else:
            details = "  ".join(f"{name} {_short(value)}" for name, value in data.items())
            line = f"[bold]{kind}[/bold]  {escape(printable(details))}"
        self._progress.console.print(line, highlight=False, soft_wrap=True)

    def advance(self, phase: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=phase, completed=done, total=total)

    def close(self) -> None:
        self._progress.stop()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
