"""Draws the README's figure from the kept measurement: `python -m tools.traffic_figure`."""

from __future__ import annotations

import csv
from pathlib import Path

from sfprompt_bench.plots import new_figure, save

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "traffic"

# Rungs of `ladder.csv` in plain words; each adds one measure to the one above it.
LABELS = {
    "paper": "as published",
    "bfloat16": "+ bfloat16 on the wire",
    "lean features": "+ only the features that the tail reads",
    "at the cut": "+ prompts tuned on the server",
    "kept": "+ smashed data sent once",
    "coded smashed": "+ smashed data in 4 bits",
    "coded steps": "+ features in 8 bits, gradients in 4",
    "coded states": "+ head and updates quantised",
    "fewer samples": "default form: + 80 % of the samples",
}

_BLUE, _GREY = "#1b6ca8", "#b9c6d2"


def draw(source: Path, destination: Path) -> None:
    """Draw one bar per rung, labelled with its traffic and accuracy."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    totals = [float(row["mb"]) for row in rows]
    figure, axes = new_figure(figsize=(8, 3.3))
    colours = [_GREY] * (len(rows) - 1) + [_BLUE]
    axes.barh([LABELS[row["rung"]] for row in rows], totals, color=colours, height=0.7)
    for number, (row, total) in enumerate(zip(rows, totals, strict=True)):
        text = f"{total:,.0f} MB, {100 * float(row['accuracy']):.1f} %"
        weight = "bold" if number == len(rows) - 1 else "normal"
        axes.annotate(
            text,
            (total, number),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight=weight,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(totals))
    axes.set_title("Traffic of one device in a whole run, and accuracy", loc="left", fontsize=11)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.xaxis.set_visible(False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    save(figure, destination)


def main() -> None:
    """Write `traffic.png` next to `ladder.csv`."""
    draw(FOLDER / "ladder.csv", FOLDER / "traffic.png")


if __name__ == "__main__":
    main()
