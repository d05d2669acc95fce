"""The live view of a run: a bar for each round, a line for each device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from protocol.messages import RoundStatus, RoundView
from protocol.traffic import total_bytes

_PHASES = ("prune", "local", "split", "neurons", "evaluate")  # in the order of a round


class LiveView:
    """Shows the devices' events and the server's rounds as bars.

    Without a terminal (a log, a pipe) it prints a line for each round instead.
    """

    def __init__(self, console: Console, devices: Sequence[str], rounds: int) -> None:
        self._console = console
        self._rounds = Progress(
            TextColumn("round {task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._devices = Progress(
            TextColumn("  {task.description}"),
            TextColumn("{task.fields[phase]:<9}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._num_rounds = rounds
        self._bars: dict[int, TaskID] = {}
        self._lines = {
            name: self._devices.add_task(name, total=None, phase="starting", note="")
            for name in devices
        }
        self._shares = dict.fromkeys(devices, 0.0)
        self._closed: set[int] = set()
        self._lock = threading.Lock()
        self._live = Live(Group(self._rounds, self._devices), console=console, refresh_per_second=5)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show_event(self, name: str, data: dict[str, Any]) -> None:
        """Show an event of a device. Called from the threads that read the devices' output."""
        with self._lock:
            line, event = self._lines[name], data.get("event")
            if event == "progress":
                phase, done, total = data["phase"], data["done"], data["total"]
                self._devices.update(line, phase=phase, completed=done, total=total)
                if phase != "reading":  # of the images, before the first round
                    self._shares[name] = (_place(phase) + done / total) / len(_PHASES)
                    self._move_round_bar()
            elif event == "joined":
                note = f"{data['train_samples']} training, {data['test_samples']} test images"
                self._devices.update(line, phase="joined", note=note)
            elif event == "trained":
                loss = data["train_loss"] or data["local_loss"] or 0
                note = f"loss {loss:.3f}  {_megabytes(data['bytes'])}"
                self._devices.update(line, note=note)
            elif event == "evaluated" and data.get("accuracy") is not None:
                self._devices.update(line, note=f"accuracy {data['accuracy']:.1%}")
            elif event == "waiting":
                self._devices.update(line, phase="waiting", note=data["reason"][:60])
            elif event == "stopped":
                self._devices.update(line, phase="done", completed=1, total=1)

    def show_rounds(self, rounds: Sequence[RoundView]) -> None:
        """Update the bars of rounds."""
        with self._lock:
            for view in rounds:
                self._show_round(view)

    def _show_round(self, view: RoundView) -> None:
        is_closed = view.status is RoundStatus.CLOSED
        if view.round not in self._bars:
            label = f"{view.round:>3}/{self._num_rounds}"
            self._bars[view.round] = self._rounds.add_task(label, total=1.0, note="")
            self._shares = dict.fromkeys(self._shares, 0.0)
        if is_closed and view.round not in self._closed:
            self._closed.add(view.round)
            note = round_note(view)
            bar = self._bars[view.round]
            self._rounds.update(bar, completed=1.0, note=note)
            self._rounds.stop_task(bar)
            if not self._console.is_terminal:
                self._console.print(f"round {view.round}/{self._num_rounds}  {note}", style="none")

    def _move_round_bar(self) -> None:
        if self._bars and max(self._bars) not in self._closed:
            share = sum(self._shares.values()) / len(self._shares)
            self._rounds.update(self._bars[max(self._bars)], completed=share)


def round_note(view: RoundView) -> str:
    """Describe a closed round: accuracy, loss and bytes, and whether its state was discarded."""
    accuracy = "not measured" if view.accuracy is None else f"{view.accuracy:6.1%}"
    mean = view.local_loss if view.train_loss is None else view.train_loss
    loss = "" if mean is None else f"  loss {mean:.3f}"
    discarded = "" if view.kept else "  discarded: worse than before"
    return f"accuracy {accuracy}{loss}  {_megabytes(total_bytes(view.traffic))}{discarded}"


def _place(phase: str) -> int:
    """The place of a phase in a round; a method's own phase stands where split training does."""
    return _PHASES.index(phase if phase in _PHASES else "split")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
