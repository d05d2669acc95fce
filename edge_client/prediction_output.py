"""Print predictions: a table for people, JSON or CSV for programs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_client.data.remarks import Remark, group_by_reason
from protocol.errors import InvalidField

if TYPE_CHECKING:
    from edge_client.prediction import Prediction

Form = Literal["table", "json", "csv"]

_FIRST_OF_FORMULAS = "=+-@\t\r"  # a spreadsheet would compute a name that begins so


def show_skipped(skipped: Iterable[Remark]) -> None:
    """Name on stderr what is left out, a few entries for each reason."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for entry in group_by_reason(skipped):
        console.print(escape(f"skipped  {entry.path}  {entry.reason}"))


def show_predictions(predictions: Iterable[Prediction], top: int, form: Form = "table") -> None:
    """Print predictions; JSON and CSV line by line, as images are classified.

    Args:
        predictions: in order.
        top: number of classes of each.
        form: ``json``: an object a line. ``csv``: the image, ``top`` pairs of a class and its
            probability, and the reason if the image cannot be read.

    Raises:
        InvalidField: none of the images can be read.
    """
    counted = _Counted(predictions)
    if form == "json":
        for prediction in counted:
            sys.stdout.write(json.dumps(prediction.to_dict()) + "\n")
            sys.stdout.flush()
    elif form == "csv":
        write_csv(counted, top, sys.stdout)
    else:
        _print_table(counted)
    if not counted.read:
        raise InvalidField("none of the images can be read", field="images", value=counted.total)


def write_csv(predictions: Iterable[Prediction], top: int, out: TextIO) -> None:
    """Write predictions as CSV (RFC 4180), with a header; see `show_predictions`."""
    writer = csv.writer(out, lineterminator="\n")
    pairs = [f"{name}{place}" for place in range(1, top + 1) for name in ("class", "probability")]
    writer.writerow(["image", *pairs, "error"])
    for prediction in predictions:
        row = [_as_cell(prediction.path)]
        for name, probability in prediction.classes:
            row += [_as_cell(name), f"{probability:.6f}"]
        row += [""] * (1 + 2 * top - len(row))
        writer.writerow([*row, prediction.error or ""])
        out.flush()


class _Counted:
    """Predictions, and how many images could be read."""

    def __init__(self, predictions: Iterable[Prediction]) -> None:
        self._predictions = predictions
        self.total = self.read = 0

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self._predictions:
            self.total += 1
            self.read += prediction.error is None
            yield prediction


def _print_table(predictions: Iterable[Prediction]) -> None:
    table = Table()
    table.add_column("image")
    table.add_column("class", style="bold")
    table.add_column("probability", justify="right")
    table.add_column("next best")
    try:
        for prediction in predictions:
            _add_row(table, prediction)
    finally:
        Console().print(table)


def _add_row(table: Table, prediction: Prediction) -> None:
    path = escape(prediction.path)
    if prediction.error is not None:
        table.add_row(path, "-", "-", f"[red]{escape(prediction.error)}[/red]")
        return
    (best, probability), *others = prediction.classes
    next_best = ", ".join(f"{name} {value:.1%}" for name, value in others)
    table.add_row(path, escape(best), f"{probability:.1%}", escape(next_best))


def _as_cell(text: str) -> str:
    return f"'{text}" if text.startswith(tuple(_FIRST_OF_FORMULAS)) else text
