"""Report a device's progress and predictions: for people, or as JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_client.data.remarks import Remark, group_by_reason
from protocol.errors import InvalidField
from protocol.printable import printable

if TYPE_CHECKING:  # it imports torch
    from edge_client.prediction import Prediction


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


def show_skipped(skipped: Iterable[Remark]) -> None:
    """Name on stderr what is left out, a few entries for each reason."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for entry in group_by_reason(skipped):
        console.print(escape(f"skipped  {entry.path}  {entry.reason}"))


def show_predictions(predictions: Iterable[Prediction], *, as_json: bool) -> None:
    """Print a table of predictions, or one JSON object for each image as it is classified.

    Raises:
        InvalidField: none of the images can be read.
    """
    table = Table()
    table.add_column("image")
    table.add_column("class", style="bold")
    table.add_column("probability", justify="right")
    table.add_column("next best")
    is_read, total = False, 0
    try:
        for prediction in predictions:
            is_read, total = is_read or prediction.error is None, total + 1
            if as_json:
                sys.stdout.write(json.dumps(prediction.to_dict()) + "\n")
                sys.stdout.flush()
            else:
                _add_row(table, prediction)
    finally:
        if not as_json:
            Console().print(table)
    if not is_read:
        raise InvalidField("none of the images can be read", field="images", value=total)


def _add_row(table: Table, prediction: Prediction) -> None:
    path = escape(prediction.path)
    if prediction.error is not None:
        table.add_row(path, "-", "-", f"[red]{escape(prediction.error)}[/red]")
        return
    (best, probability), *others = prediction.classes
    next_best = ", ".join(f"{name} {value:.1%}" for name, value in others)
    table.add_row(path, escape(best), f"{probability:.1%}", escape(next_best))
