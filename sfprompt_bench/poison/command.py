"""The command ``sfprompt-bench poison``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from protocol.federation import AggregationRule
from sfprompt_bench.presets import JsonFile, preset_named
from sfprompt_bench.run.preflight import check_packages

if TYPE_CHECKING:
    from sfprompt_bench.poison.measure import PoisonResult

RULES: tuple[tuple[AggregationRule, bool], ...] = (
    ("fedavg", False),
    ("fedavg", True),
    ("median", True),
    ("trimmed-mean", True),
    ("krum", True),
    ("multi-krum", True),
)  # the rule, and whether the bound on the updates' norms is on

SHARES = (0.0, 0.1, 0.2, 0.4)

_HELD_OUT = 0.2

_QUICK_IMAGES, _QUICK_ROUNDS, _QUICK_SHARES = 300, 3, (0.0, 0.2, 0.4)


def poison(
    data: Annotated[str, typer.Option(help="Preset: digits | fashion-mnist")] = "digits",
    samples: Annotated[
        int, typer.Option(min=50, help="Number of training images of all devices.")
    ] = 1000,
    devices: Annotated[int, typer.Option(min=5, max=100, help="Number of devices.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds of each run.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images and rounds.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the accuracy with hostile devices, for each attack and aggregation rule.

    The server's federation code runs in this process, with its frames, database, bound and rules.
    The devices tune a classifier on frozen features, so that a run takes seconds.
    """
    check_packages()
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from edge_client.data.dataset import limit_per_set
    from edge_client.data.sources import load_dataset, parse_source
    from sfprompt_bench.poison.attacks import ATTACKS
    from sfprompt_bench.poison.chart import draw
    from sfprompt_bench.poison.measure import make_plan, measure_all, prepare_data

    shares: tuple[float, ...] = SHARES
    if quick:
        samples, rounds, shares = _QUICK_IMAGES, _QUICK_ROUNDS, _QUICK_SHARES
    source = load_dataset(parse_source(data), held_out=_HELD_OUT, seed=seed)
    images = limit_per_set(source, train=samples, test=samples, seed=seed)
    settings = preset_named(data).settings.model_copy(update={"seed": seed})
    console = Console()
    results: list[PoisonResult] = []
    total = len(RULES) * (1 + len(ATTACKS) * (len(shares) - 1))
    with console.status("computing features …") as status:
        base = make_plan(settings.plan, "fedavg", bound=True, rounds=rounds)
        prepared = prepare_data(base, images, devices)
        for result in measure_all(settings.plan, prepared, RULES, list(ATTACKS), shares, rounds):
            results.append(result)
            status.update(f"run {len(results)} of {total}")
    console.print(_table(results))
    if plot is not None:
        console.print(f"plot: {draw(results, plot)}")
    if json_file is not None:
        values = [dataclasses.asdict(result) for result in results]
        json_file.write_text(json.dumps(values, indent=2) + "\n")


def _table(results: list[PoisonResult]) -> Table:
    names = list(dict.fromkeys(result.label for result in results))
    table = Table(
        title="Accuracy on held-out images, %",
        title_justify="left",
        caption="in brackets: patched images of other classes predicted as class 0, %",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("attack", "hostile"):
        table.add_column(heading, no_wrap=True)
    for name in names:
        table.add_column(name.replace("-", " "), justify="right")
    by_row: dict[tuple[str, float], dict[str, PoisonResult]] = {}
    for result in results:
        row = by_row.setdefault((result.attack or "none", result.hostile), {})
        row[result.label] = result
    for (attack, hostile), row in by_row.items():
        shown = [_shown(row[name]) if name in row else "" for name in names]
        table.add_row(attack, f"{hostile:.0%}", *shown)
    return table


def _shown(result: PoisonResult) -> str:
    backdoor = f" ({100 * result.backdoor:.0f})" if result.attack == "backdoor" else ""
    return f"{100 * result.accuracy:.1f}{backdoor}"
