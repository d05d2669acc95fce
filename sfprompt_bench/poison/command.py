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
)  # and whether the labels of the devices are compared

SHARES = (0.0, 0.1, 0.2, 0.4)

_HELD_OUT = 0.2

_QUICK_IMAGES, _QUICK_ROUNDS, _QUICK_SHARES = 300, 3, (0.0, 0.2, 0.4)


def poison(
    data: Annotated[str, typer.Option(help="Preset: digits | fashion-mnist")] = "digits",
    samples: Annotated[int, typer.Option(min=50, help="Training images of all devices.")] = 1000,
    devices: Annotated[int, typer.Option(min=5, max=100, help="Number of devices.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images and rounds.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure accuracy with hostile devices, for each attack and aggregation rule.

    Runs are of the default form. The server's federation runs in this process: sums, frames,
    database, checks and rules are those of a run. Features are computed once, so that a run takes
    seconds.
    """
    check_packages()
    # Imported here: torch takes seconds to import, which help and errors do not need.
    from edge_client.data.dataset import limit_per_set
    from edge_client.data.sources import load_dataset, parse_source
    from sfprompt_bench.poison.attacks import ATTACKS
    from sfprompt_bench.poison.chart import draw
    from sfprompt_bench.poison.data import prepare_data
    from sfprompt_bench.poison.measure import PoisonBench, Rule

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
        bench = PoisonBench(settings.plan, prepare_data(settings.plan, images, devices), rounds)
        rules = [Rule(name, compares) for name, compares in RULES]
        for result in bench.measure_all(rules, list(ATTACKS), shares):
            results.append(result)
            status.update(f"run {len(results)} of {total}")
    console.print(_table(results))
    console.print(_states_table([each for each in results if each.rule == "fedavg"]))
    if plot is not None:
        console.print(f"plot: {draw(results, plot)}")
    if json_file is not None:
        values = [dataclasses.asdict(result) for result in results]
        json_file.write_text(json.dumps(values, indent=2) + "\n")


def _table(results: list[PoisonResult]) -> Table:
    names = list(dict.fromkeys(result.rule for result in results))
    table = _new_table("Accuracy of the last state on held-out images, %")
    table.caption = "in brackets: patched images of other classes that become class 0, %"
    for name in names:
        table.add_column(name.replace("-", " "), justify="right")
    by_row: dict[tuple[str, float], dict[str, PoisonResult]] = {}
    for result in results:
        row = by_row.setdefault((result.attack or "none", result.hostile), {})
        row[result.rule] = result
    for (attack, hostile), row in by_row.items():
        shown = [_shown(row[name]) if name in row else "" for name in names]
        table.add_row(attack, f"{hostile:.0%}", *shown)
    return table


def _states_table(results: list[PoisonResult]) -> Table:
    table = _new_table("The states of the default rule, %")
    table.caption = "best: as the devices report it, hostile ones lying"
    headings = ("round 0", "last", "best", "hostile updates refused", "honest")
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in results:
        shares = (each.start, each.last, each.best, each.refused, each.refused_honest)
        shown = [f"{100 * share:.1f}" for share in shares]
        table.add_row(each.attack or "none", f"{each.hostile:.0%}", *shown)
    return table


def _new_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("attack", "hostile"):
        table.add_column(heading, no_wrap=True)
    return table


def _shown(result: PoisonResult) -> str:
    backdoor = f" ({100 * result.backdoor:.0f})" if result.attack == "backdoor" else ""
    return f"{100 * result.last:.1f}{backdoor}"
