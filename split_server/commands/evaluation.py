"""``split-server evaluation``: accuracy by device and by class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from protocol.errors import InvalidField, NotFound
from protocol.messages import Results, RoundStatus
from protocol.printable import printable
from protocol.quality import EvaluationView, Quality
from split_server.commands.runs import Connect, Json, RunId, out, with_connection

_MAX_MATRIX = 12  # classes whose matrix is 80 columns wide or less

_SHOWN_NAME = 14  # letters of a class or device


@with_connection
def evaluation(
    connect: Connect,
    run: RunId,
    round_: Annotated[
        str,
        typer.Option(
            "--round",
            metavar="newest|best|N",
            help="best: the round of the highest accuracy on held-out images.",
        ),
    ] = "newest",
    as_json: Json = False,
) -> None:
    """Show how well a round's model classifies held-out images, by device and by class."""
    client = connect()
    results = client.results(run)
    view = client.evaluation(run, _choose(results, round_))
    if as_json:
        typer.echo(view.model_dump_json())
        return
    if view.quality is None:
        out.print(f"no device has evaluated round {view.round}")
        return
    for line in _summary(view, view.quality, results):
        out.print(line, highlight=False, markup=False)
    out.print(_devices_table(view))
    if view.classes:
        out.print(_classes_table(view))
    if 0 < len(view.classes) <= _MAX_MATRIX:
        out.print(_matrix(view))


def _choose(results: Results, text: str) -> int:
    measured = [
        view
        for view in results.rounds
        if view.status == RoundStatus.CLOSED and view.accuracy is not None
    ]
    if text.isdecimal():
        return int(text)
    if text not in ("newest", "best"):
        raise InvalidField(
            "this names no round", field="round", limit="newest, best or a number", value=text
        )
    if not measured:
        raise NotFound(
            "the run has no evaluated round yet",
            field="round",
            value=text,
            hint=results.waiting,
        )
    if text == "newest":
        return measured[-1].round
    return max(measured, key=lambda view: (view.accuracy or 0.0, -view.round)).round


def _summary(view: EvaluationView, quality: Quality, results: Results) -> Iterator[str]:
    devices = len(view.devices)
    yield (
        f"round {view.round}: {quality.samples:,} held-out images on {devices} "
        f"device{'s' * (devices != 1)}"
    )
    yield f"accuracy {quality.accuracy:.2%}, loss {quality.loss:.4f}"
    if quality.majority is not None:
        yield (
            f"balanced accuracy {_percent(quality.balanced_accuracy)}, macro F1 "
            f"{_percent(quality.macro_f1)}, calibration error "
            f"{_percent(quality.calibration_error)}"
        )
        yield f"always the most frequent class: {quality.majority:.2%}"
    start = next((each for each in results.rounds if each.round == 0), None)
    if start is not None and start.accuracy is not None and view.round:
        yield f"closed-form start (round 0): {start.accuracy:.2%}"
    worst = min(view.devices, key=lambda each: each.quality.accuracy)
    if devices > 1:
        yield f"lowest accuracy: {printable(worst.name)}, {worst.quality.accuracy:.2%}"


def _devices_table(view: EvaluationView) -> Table:
    table = Table("device", title="By device", title_justify="left")
    for name in ("images", "accuracy", "balanced", "macro F1", "loss"):
        table.add_column(name, justify="right")
    for device in view.devices:
        quality = device.quality
        table.add_row(
            escape(printable(device.name)),
            f"{quality.samples:,}",
            _percent(quality.accuracy),
            _percent(quality.balanced_accuracy),
            _percent(quality.macro_f1),
            f"{quality.loss:.4f}",
        )
    return table


def _classes_table(view: EvaluationView) -> Table:
    table = Table("class", title="By class", title_justify="left")
    for name in ("images", "recall", "precision"):
        table.add_column(name, justify="right")
    table.add_column("most often taken for")
    names = [each.name for each in view.classes]
    for number, each in enumerate(view.classes):
        wrong = [
            (count, predicted)
            for label, predicted, count in view.confusion
            if label == number and predicted != number
        ]
        count, predicted = max(wrong, default=(0, 0))
        table.add_row(
            escape(printable(each.name)),
            f"{each.samples:,}",
            _percent(each.recall),
            _percent(each.precision),
            escape(f"{printable(names[predicted])} ({count})") if count else "",
        )
    return table


def _matrix(view: EvaluationView) -> Table:
    names = [_shorten(each.name) for each in view.classes]
    cells = {(label, predicted): count for label, predicted, count in view.confusion}
    title = "Images of each class (rows) by predicted class (columns)"
    table = Table("", title=title, title_justify="left", padding=(0, 0))
    for number in range(len(names)):
        table.add_column(str(number), justify="right")
    for label, name in enumerate(names):
        row = [cells.get((label, predicted), 0) for predicted in range(len(names))]
        shown = [
            f"[bold]{count}[/bold]" if label == predicted else str(count or "")
            for predicted, count in enumerate(row)
        ]
        table.add_row(escape(f"{label} {name}" if name != str(label) else name), *shown)
    return table


def _shorten(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _SHOWN_NAME else name[: _SHOWN_NAME - 1] + "…"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
